"""The module that an adaptation gives: called as the model is, and able to forget."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm._errors import SurgeryError
from batchnorm.nn.recognition import Layer, unwrapped
from batchnorm.probes.feeding import ForwardFn, feed, size_of, undisturbed
from batchnorm.surgery.changes import Change, remember, stands_for
from batchnorm.surgery.recalibrate import recalibrate
from batchnorm.surgery.sortedness import SortedBatchesWarning, Sortedness
from batchnorm.surgery.streaming import Statistics, evaluating
from batchnorm.surgery.tent import Entropy, LogitsOf, find_logits

OnSorted = Literal["warn", "raise", "ignore"]


class Adapted(nn.Module):
    """A model that has been adapted, or adapts to each batch: made by :func:`adapt`, called as the model is.

    Attributes:
        model: the model that was given.
        sortedness: how far the batches were sorted by class; see :class:`batchnorm.surgery.sortedness.Sortedness`.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        way: Statistics | Entropy,
        forward_fn: ForwardFn | None,
        *,
        logits: LogitsOf | None,
        episodic: bool,
        online: bool,
        on_sorted: OnSorted,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        stands_for(self, model)
        self.sortedness = Sortedness()
        self._layers = [layer.module for layer in layers]
        self._way, self._forward_fn, self._logits = way, forward_fn, logits
        self._episodic, self._online, self._on_sorted = episodic, online, on_sorted
        self._warned = False
        self._source = [tensor.detach().clone() for tensor in self._state()]
        self._way.start(self._layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model returns; where it adapts to what it is called with, it does that too."""
        inner = self._inner()
        with _for_gradients(isinstance(self._way, Entropy)):
            args, kwargs = pytree.tree_map_only(Tensor, _outside_inference, (args, kwargs))
            if self._forward_fn is not None:
                run = partial(self._forward_fn, inner, *args, **kwargs)
            else:
                run = partial(inner, *args, **kwargs)
            if not self._online:
                with evaluating(inner):
                    return run()
            self._look(inner, run)
            if self._episodic:
                self._restore()
            return self._way(inner, self._layers, run)

    def reset(self) -> None:
        """Forget: statistics, gamma and beta are, to the bit, what they were when :func:`adapt` was called.

        The optimizer starts anew, and so does the search for sorted batches. Raises SurgeryError where the model has
        them no more, since :func:`batchnorm.convert` made something else of its batch norms.
        """
        now, there = self._state(), {*self.model.parameters(), *self.model.buffers()}
        if [t.shape for t in now] != [t.shape for t in self._source] or not there.issuperset(now):
            raise SurgeryError(
                "expected the statistics, gammas and betas that were adapted, got a model with others: "
                "bn.revert(model) what was converted since, then reset"
            )
        self._restore()
        self.sortedness, self._warned = Sortedness(), False
        remember(self.model, "reset", [Change("", "batch norms are as they were before the adaptation")])

    def _inner(self) -> nn.Module:
        """What the model is without its wrappers; its batch norms must be those that were adapted."""
        inner = unwrapped(self.model)[0]
        if not set(self._layers) <= set(inner.modules()):
            raise SurgeryError(
                "expected the batch norms that were adapted, got a model with others in their places: convert it "
                "before, and adapt it anew"
            )
        return inner

    def _restore(self) -> None:
        self._set(self._source)
        self._way.start(self._layers)

    def _state(self) -> list[Tensor]:
        return [t for layer in self._layers for t in (*layer.parameters(), *layer.buffers())]

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The state of the source, for a while."""
        adapted = [tensor.detach().clone() for tensor in self._state()]
        try:
            self._set(self._source)
            yield
        finally:
            self._set(adapted)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._state(), values, strict=True):
            tensor.copy_(value)

    def _look(self, inner: nn.Module, run: Callable[[], Any]) -> None:
        """Whether batches are sorted, from what the source predicts for this one."""
        if self._on_sorted == "ignore":
            return
        with self._as_it_was(), undisturbed(inner, training=False):
            found = find_logits(run(), self._logits)
        if found is None or found.dim() != 2 or found.size(1) < 2 or not bool(found.isfinite().all()):
            return
        self.sortedness.add(found.argmax(1), found.size(1))
        if not self.sortedness.is_sorted or self._warned:
            return
        told = f"{self.sortedness}: shuffle them, or adapt to a shuffled sample of the data with batches="
        if self._on_sorted == "raise":
            raise SurgeryError(told)
        self._warned = True
        warnings.warn(told, SortedBatchesWarning, stacklevel=2)

    def adapt_to(self, batches: Iterable[Any], num_batches: int | None) -> str:
        """Adapt to ``batches`` now; what was done, in words."""
        inner = unwrapped(self.model)[0]
        again = iter(batches) is not batches
        if again and self._on_sorted != "ignore":
            for batch in islice(batches, num_batches):
                self._look(inner, partial(feed, inner, batch, self._forward_fn))
        if isinstance(self._way, Entropy):
            for batch in islice(batches, num_batches):
                self._way(inner, self._layers, partial(feed, inner, batch, self._forward_fn))
        counted, chosen = _Counted(batches), {layer for layer in self._layers if "running_mean" in layer._buffers}
        with _moving(chosen):
            recalibrate(
                inner,
                counted,
                self._forward_fn,
                num_batches=num_batches,
                layers=lambda _, module: module in chosen,
                process_group=False,
            )
        seen = f"{counted.samples} samples of the target"
        if isinstance(self._way, Entropy):
            return f"gamma and beta learnt from {seen}, with whose statistics it normalizes"
        self._way.mix(self._layers, counted.samples)
        unchecked = "" if again else "; whether batches are sorted was not looked at: an iterator can be read once only"
        return f"normalizes with the statistics of {seen}, and a prior of {self._way.prior:g}{unchecked}"


@contextmanager
def _moving(layers: set[nn.Module]) -> Iterator[None]:
    """Layers whose running statistics are not to move, as those of a frozen layer, are adapted all the same."""
    still = [layer for layer in layers if not layer.track_running_stats]
    try:
        for layer in still:
            layer.__dict__["track_running_stats"] = True
        yield
    finally:
        for layer in still:
            layer.__dict__["track_running_stats"] = False


class _Counted:
    """Batches, and how many samples there were in them."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches, self.samples = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.samples = 0
        for batch in self._batches:
            self.samples += size_of(batch) or 0
            yield batch


@contextmanager
def _for_gradients(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with torch.inference_mode(False):
        yield


def _outside_inference(tensor: Tensor) -> Tensor:
    """A tensor that autograd may keep."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
