"""A training step whose batch is spread over processes: one collective forward, one backward.

Forward, the processes gather count, mean and m2 of their own parts and pool them, each for itself and in the same
order, so that all have the same bits. Gathered and not added up: sums could be added only about a shift that all know
beforehand, or as E[x^2], and neither is exact. It is 2 C + 3 numbers a process. Backward they add up sum dz and
sum dz * x_hat, 2 C numbers. A process without data takes part in both with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm._errors import ShapeError
from batchnorm.moments import pooled
from batchnorm.ops import fakes, reference
from batchnorm.ops import registration as registration  # defines the operators
from batchnorm.ops.collectives import Peers, add_up, all_gather, all_reduce, check_signatures, gather, signature
from batchnorm.ops.gradients import differentiable_backward
from batchnorm.ops.schema import NAMESPACE, needs_residual

Statistics = tuple[Tensor, Tensor, Tensor]
Stats = Callable[[Tensor, Tensor | None], Statistics]

_HEADER = 2  # numbers before count, mean and m2: the signature, and the positions

SCHEMA = (
    "shared_normalize(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? mask, str activation, Tensor count, float eps, str group, int size, int rank) -> (Tensor y, Tensor sign)"
)


class Running(NamedTuple):
    """What a training step moves, and how: the last arguments of ``update_running``, around the statistics."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float | None
    num_batches: Tensor | None
    ddof: int


def train_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    eps: float,
    activation: str,
    peers: Peers,
) -> Tensor:
    """y of Algorithm 1 over the batch of all ``peers``, and the running averages moved, on each the same.

    Raises ShapeError where all of them together have one value per channel, and SynchronizationError, before anything
    was counted.
    """
    composing = reference.composing() and not torch.compiler.is_compiling()
    # A transform must find its way through the statistics; otherwise shared_normalize has the whole gradient.
    stats = reference.stats if composing else _outside_the_gradient
    gathered = (gather if composing else all_gather)(_packed(x, *stats(x, mask)), peers)
    _check(x, gathered, composing)
    count, mean, m2 = _pooled(x, gathered)
    var = m2 / count.clamp(min=1)
    invstd = torch.rsqrt(var + eps)
    if composing:
        y = reference.normalize(x, mean, invstd, weight, bias, residual, mask, activation)[0]
    else:
        y = torch.ops.batchnorm.shared_normalize(
            x, mean, invstd, weight, bias, residual, mask, activation, count, eps, peers.name, peers.size, peers.rank
        )[0]
    if running.num_batches is not None:
        running.num_batches.add_(1)
    if running.mean is not None and running.var is not None:
        update = reference.update_running if composing else torch.ops.batchnorm.update_running
        with torch.no_grad():
            update(running.mean, running.var, mean.detach(), var.detach(), count.detach(), *running[2:])
    return y


def _outside_the_gradient(x: Tensor, mask: Tensor | None) -> Statistics:
    return torch.ops.batchnorm.stats(x.detach(), mask)


def _packed(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    header = (mean.new_full((1,), signature(x)), mean.new_full((1,), _positions(x)))
    return torch.cat([*header, count.reshape(1), mean, m2])


def _pooled(x: Tensor, gathered: Tensor) -> Statistics:
    """The statistics of all parts together: count (), mean and m2 (C,)."""
    _, count, mean, m2 = gathered.split([_HEADER, 1, x.size(1), x.size(1)], dim=1)
    total, mean, m2 = pooled(count, mean, m2)
    return total.reshape(()), mean, m2


def _positions(x: Tensor) -> int:
    return x.size(0) * math.prod(x.shape[2:])


def _check(x: Tensor, gathered: Tensor, composing: bool) -> None:
    """What only all ranks together can know. The values of a transform's tensors cannot be read: nothing is checked."""
    if composing:
        return
    # Where one rank has more than one position, all know that there are more: only the others look at the sum.
    in_doubt = _positions(x) <= 1
    if torch.compiler.is_compiling():
        torch._assert_async((gathered[:, 0] == signature(x)).all(), "the ranks disagree in channels or dtype")
        if in_doubt:
            torch._assert_async(gathered[:, 1].sum() != 1, "Expected more than 1 value per channel when training")
        return
    if x.device.type == "cpu":  # elsewhere reading it would make the processor wait for the device at every step
        check_signatures(x, gathered[:, 0])
    if in_doubt and gathered[:, 1].sum() == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got one on all ranks together, here {x.size()}"
        )


# --- the operator -----------------------------------------------------------------------------------------------------


def _shared_normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """``normalize``, for statistics that the x of all processes have made. Only its gradient differs."""
    return torch.ops.batchnorm.normalize(x, mean, invstd, weight, bias, residual, mask, activation)


def _fake(x: Tensor, mean: Tensor, invstd: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, *rest: Any) -> Any:
    return fakes.normalize(x, mean, invstd, weight, bias, residual, mask, rest[0])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mean, invstd, weight, bias, residual, mask, activation, count, eps, *peers = inputs
    _, sign = output
    ctx.mark_non_differentiable(sign)
    ctx.activation, ctx.eps, ctx.peers = activation, eps, Peers(*peers)
    ctx.residual_dtype = None if residual is None else residual.dtype
    kept = residual if needs_residual(activation) else None
    ctx.save_for_backward(x, mean, invstd, weight, bias, kept, sign, mask, count)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, mean, invstd, weight, bias, residual, sign, mask, count = ctx.saved_tensors
    peers = ctx.peers
    # Without activation and mask the residual's gradient is `grad` itself.
    same = ctx.activation == "none" and mask is None
    want_residual = ctx.needs_input_grad[5] and not same
    affine = (weight, bias, residual, sign, mask, ctx.activation)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        dx, dweight, dbias, dresidual = differentiable_backward(
            grad,
            x,
            affine,
            ctx.eps,
            want_residual,
            pool=lambda *statistics: _pooled(x, gather(_packed(x, *statistics), peers)),
            total=lambda sums: add_up(sums, peers),
        )
    else:
        sums = torch.ops.batchnorm.grad_sums(grad, x, mean, invstd, *affine)
        # Whether or not dx is asked for here: another process may need these sums for its own.
        sum_dz, sum_dz_xhat = all_reduce(torch.cat(sums), peers).split(x.size(1))
        dx, dresidual = torch.ops.batchnorm.grad_input(
            grad, x, mean, invstd, *affine, count, sum_dz, sum_dz_xhat, want_residual
        )
        dbias, dweight = sums
    return (
        dx,
        None,
        None,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        (grad if same else dresidual).to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None,
        *(None,) * 7,
    )


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("shared_normalize", _shared_normalize, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::shared_normalize", _fake, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::shared_normalize", _backward, setup_context=_context, lib=_library)
