"""Functional forms of the layers: the same arithmetic without the state, or with state in and state out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.nn.alignment import coral_loss
from batchnorm.ops.functional import batch_norm

__all__ = ["State", "batch_norm", "batch_norm_with_state", "call_with_state", "coral_loss"]


class State(NamedTuple):
    """What a training step moves: (C,), (C,) and ()."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


def batch_norm_with_state(
    input: Tensor, state: State, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, State]:
    """A training step of :func:`batch_norm` as a pure function: y, and the state after it.

    Nothing that is passed in is changed, so that steps can be replayed, mapped (``torch.vmap``, over inputs that share
    a state too: each then has a state of its own afterwards), scanned and compiled. The gradient goes through y; the
    new state is outside of it, as everywhere.

    Args:
        input, weight, bias: as in :func:`batch_norm`.
        state: the averages before this batch, and how many batches they have seen; a tuple of three will do.
        **options: the other arguments of :func:`batch_norm`: momentum, eps, mask, activation and so on.

    Raises:
        As :func:`batch_norm`.
    """
    fresh = State(*_own(state, [input, weight, bias, *options.values()]))
    y = batch_norm(
        input,
        fresh.running_mean,
        fresh.running_var,
        weight,
        bias,
        True,
        num_batches_tracked=fresh.num_batches_tracked,
        **options,
    )
    return y, fresh


def call_with_state(
    module: torch.nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """``torch.func.functional_call`` as a pure function: the module's output, and its buffers after the call.

    ``functional_call`` moves the buffers that it is given in place; here they stay as they were, and the new ones are
    returned. For any layer of this package, and any model that holds some.

    Args:
        module: says what is computed; its own parameters and buffers are used where none is given.
        parameters, buffers: by name, as ``dict(module.named_parameters())`` and ``dict(module.named_buffers())``.
        *args, **kwargs: those of ``module``.
    """
    values = _own(tuple(buffers.values()), [*parameters.values(), *args, *kwargs.values()])
    fresh = dict(zip(buffers, values, strict=True))
    output = torch.func.functional_call(module, {**parameters, **fresh}, args, kwargs)
    return output, fresh


def _own(tensors: tuple[Tensor, ...], beside: list[Any]) -> list[Tensor]:
    """Copies to be written to, for every member of a batch that ``torch.vmap`` maps the tensors beside them over."""
    like = [each.new_zeros((), dtype=torch.bool) for each in beside if isinstance(each, Tensor) and not each.is_nested]
    copies = [tensor.detach().clone() for tensor in tensors]
    for mapped in like:
        # Both choices are the same: what matters is that the result belongs to the level of `mapped`.
        copies = [torch.where(mapped.to(copy.device), copy, copy) for copy in copies]
    return copies
