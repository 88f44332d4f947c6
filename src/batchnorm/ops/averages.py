"""Running averages: when they move.

Activation checkpointing runs a forward a second time, inside the backward pass, to get back what it did not keep. It
is the same batch: it must not be counted or averaged twice. Whoever recomputes, be it ``torch.utils.checkpoint`` (both
kinds, selective too), a reversible block or a pipeline, does it while autograd executes a graph, and autograd tells.

So a training forward inside a backward pass moves no average. What that takes for a recomputation and is none: code
that feeds *new* data through a training layer from within a hook or the ``backward`` of an autograd function. And what
it cannot serve: wrappers that correct for the second run themselves, by letting only the second one count (fairscale's
``checkpoint_wrapper``) or by a smaller momentum. Use ``torch.utils.checkpoint`` itself instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import ghost, reference
from batchnorm.ops import registration as registration  # defines the namespace
from batchnorm.ops.schema import NAMESPACE

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_graph_task = torch._C._current_graph_task_id  # -1 where this thread executes none


def in_backward() -> bool:
    """Whether autograd is executing a backward pass in this thread. Not to be asked while torch.compile traces."""
    return _graph_task() != -1


def _recomputing(like: Tensor) -> Tensor:
    return torch.full((), in_backward(), device=like.device)


# A compiled layer may itself be checkpointed, by code that is not compiled. Only a call that stays in the graph can ask
# at the time when the graph runs.
_library.define("recomputing(Tensor like) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("recomputing", _recomputing, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{NAMESPACE}::recomputing", lambda like: like.new_empty((), dtype=torch.bool), lib=_library
)


@torch.library.register_vmap(f"{NAMESPACE}::recomputing", lib=_library)
def _one_for_all(_info: Any, _in_dims: Any, like: Tensor) -> tuple[Tensor, None]:
    return _recomputing(like), None


def update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    ddof: int,
    *,
    masked: bool,
) -> None:
    """Count a batch and move the averages towards it; neither for a recomputation or a batch without a real value.

    Everything in place and outside the gradient. ``var`` is biased. Where running_mean and running_var have another
    shape than (C,), or are complex, mean and var have that shape: any statistic is averaged so.

    Args:
        masked: whether ``count`` may be 0 because of a mask. (An empty batch is counted and averages nothing, in torch
            too.)
    """
    again = None
    if torch.compiler.is_compiling():
        if not reference.composing():  # what is exported is not recomputed
            again = torch.ops.batchnorm.recomputing(mean)
            count = torch.where(again, 0, count)
    elif in_backward():
        return
    with torch.no_grad():
        if num_batches is not None:
            if masked:
                num_batches.add_(count > 0)
            else:
                num_batches.add_(1 if again is None else ~again)
        if running_mean is not None and running_var is not None:
            move = _mover(running_var)
            move(running_mean, running_var, mean.detach(), var.detach(), count, momentum, num_batches, ddof)


def update_in_order(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches: Tensor | None,
    saved: Tensor,
    momentum: float | None,
    ddof: int,
) -> None:
    """:func:`update` for the ghosts of a batch, one after the other; ``saved`` is that of :mod:`batchnorm.ops.ghost`.

    A ghost without a real value is none: as if what is masked were not there.
    """
    inside = torch.compiler.is_compiling()
    if inside:
        if not reference.composing():
            again = torch.ops.batchnorm.recomputing(saved)
            saved = torch.cat([saved[:, :-1], torch.where(again, 0, saved[:, -1:])], 1)
    elif in_backward():
        return
    with torch.no_grad():
        if num_batches is not None:
            num_batches.add_((saved[:, -1] > 0).sum())
        if running_mean is not None and running_var is not None:
            move = ghost.ghost_update if inside or reference.composing() else torch.ops.batchnorm.ghost_update
            move(running_mean, running_var, saved, momentum, num_batches, ddof)


def _mover(running: Tensor) -> Any:
    """The operator, or the reference: for a statistic that the kernels do not know, and where torch looks inside.

    That is torch.func, and torch.compile, which fuses a few vectors' arithmetic itself and would copy the buffers
    around an operator that changes them.
    """
    known = running.dim() == 1 and running.is_floating_point()
    inside = torch.compiler.is_compiling() or reference.composing()
    return torch.ops.batchnorm.update_running if known and not inside else reference.update_running
