"""How a model is run on somebody's batches, and how to leave no trace of having done it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from batchnorm._errors import InputError

_probing = ContextVar("probing", default=False)

ForwardFn = Callable[[nn.Module, Any], Any]
"""How a model takes a batch of a user's own kind: ``forward_fn(model, batch)``."""


def check_batches(batches: Any) -> None:
    """Raise InputError where ``batches`` is no iterable, or one batch: its rows, keys or letters are no batches."""
    if isinstance(batches, Tensor | Mapping | str | nn.Module):
        raise InputError(f"expected batches to iterate over, got one {type(batches).__name__}: give a list of batches")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise InputError(f"expected batches to iterate over, got {type(batches).__name__}: give a list of batches")


def feed(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Any:
    """Run ``model`` on ``batch``, moved to the model's device.

    A tensor is ``model(batch)``; a mapping ``model(**batch)``; of a tuple or list, which in torch is (inputs, targets),
    the first item: itself a tensor, a mapping or a tuple, and then ``model(*inputs)``. ``forward_fn(model, batch)``
    takes the place of all this.
    """
    return call(model, on_device(batch, device_of(model)), forward_fn)


def call(model: nn.Module, batch: Any, forward_fn: ForwardFn | None = None) -> Any:
    """:func:`feed` for a batch that is where the model is; a loop need not ask for the device each time."""
    if forward_fn is not None:
        return forward_fn(model, batch)
    positional, named = arguments(batch)
    return model(*positional, **named)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for ``batch``: positional and named arguments. See :func:`feed`."""
    if isinstance(batch, tuple | list) and not _is_named_tuple(batch) and batch:
        first = batch[0]
        if isinstance(first, tuple | list) and not _is_named_tuple(first):
            return tuple(first), {}
        batch = first
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in batch.items()}
    return (batch,), {}


def size_of(batch: Any) -> int | None:
    """N: the first dimension of the first tensor of ``batch``, or None where it holds none."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.size(0)
    return None


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer is; None for a model without any, or in several places."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return found.pop() if len(found) == 1 else None


def on_device(batch: Any, device: torch.device | None) -> Any:
    """``batch`` with its tensors on ``device``; as it is where that is None."""
    if device is None or device.type == "meta":
        return batch
    # A PackedSequence moves as one: its batch sizes stay where they are.
    return pytree.tree_map_only(
        Tensor | PackedSequence,
        lambda item: item if _device(item) == device else item.to(device),
        batch,
        is_leaf=lambda item: isinstance(item, PackedSequence),
    )


def of_no_inference(batch: Any) -> Any:
    """``batch`` with copies of those tensors that were made in inference mode: outside of it nothing writes to them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, batch)


def _device(item: Tensor | PackedSequence) -> torch.device:
    return item.data.device if isinstance(item, PackedSequence) else item.device


@contextmanager
def undisturbed(model: nn.Module, training: bool | None = None) -> Iterator[nn.Module]:
    """Run ``model`` without gradients, and have its buffers, modes and random state back afterwards, come what may.

    Inside the block :func:`probing` is true.

    Args:
        model: whose forward passes are inside the block.
        training: the mode of all its modules inside the block; None leaves each in its own.
    """
    modes = {module: module.training for module in model.modules()}
    restore = buffers_kept(model)
    devices = [tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"]
    token = _probing.set(True)
    try:
        with torch.random.fork_rng(devices={device.index or 0 for device in devices}), torch.no_grad():
            if training is not None:
                model.train(training)
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
        restore()
        _probing.reset(token)


def probing() -> bool:
    """Whether a probe runs a model just now: such passes are none of training's, and a watch must not count them."""
    return _probing.get()


def buffers_kept(model: nn.Module) -> Callable[[], None]:
    """Remember which the buffers of ``model`` are, and their values; the result brings both back, any number of times.

    Values are written through ``.data``: a graph that waits for its backward pass does not take that for a change.
    """
    held = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = {
        buffer: buffer.detach().clone()
        for _, buffers in held
        for buffer in buffers.values()
        if buffer is not None and buffer.device.type != "meta"
    }

    def restore() -> None:
        for module, buffers in held:
            # Some modules assign a new tensor where others write into the old one; a script cannot.
            if not isinstance(module, torch.jit.ScriptModule):
                module._buffers.update(buffers)
        for buffer, value in values.items():
            if buffer.shape == value.shape:
                buffer.data.copy_(value)
            else:  # an observer of quantization lets its own grow
                buffer.data = value.clone()

    return restore


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
