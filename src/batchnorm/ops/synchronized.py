"""A training step whose batch is spread over processes: one collective forward, one backward.

Forward, the processes gather count, mean and m2 of their own parts and pool them, each for itself and in the same
order, so that all have the same bits. Gathered and not added up: sums could be added only about a shift that all know
beforehand, or as E[x^2], and neither is exact. It is 2 C + 2 numbers a process. Backward they add up sum dz and
sum dz * x_hat, 2 C numbers. A process without data takes part in both with zeros.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm._errors import ShapeError
from batchnorm.moments import pooled
from batchnorm.ops import fakes, reference
from batchnorm.ops import registration as registration  # defines the operators
from batchnorm.ops.collectives import Peers, add_up, all_gather, all_reduce, check_signatures, gather, signature
from batchnorm.ops.gradients import differentiable_backward, residual_gradient, wants_residual
from batchnorm.ops.schema import NAMESPACE, needs_residual

Statistics = tuple[Tensor, Tensor, Tensor]

SCHEMA = (
    "shared_normalize(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? mask, str activation, Tensor count, float eps, str group, int size, int rank) -> (Tensor y, Tensor sign)"
)


class Part(NamedTuple):
    """What makes a training step that of one process's part of a batch.

    ``fused``: with an operator that has the whole gradient, statistics included. Otherwise the statistics themselves
    are differentiated, which costs more passes over x and finds its way through ``torch.func``.
    """

    peers: Peers
    fused: bool

    def statistics(self, operators: Any, x: Tensor, mask: Tensor | None, *, refuse_single: bool) -> Statistics:
        """count (), mean and m2 (C,) of the whole batch.

        Raises SynchronizationError, and ShapeError for a single value where ``refuse_single``.
        """
        if self.fused:
            gathered = all_gather(_packed(x, *operators.stats(x.detach(), mask)), self.peers)
        else:
            gathered = gather(_packed(x, *operators.stats(x, mask)), self.peers)
        statistics = _pooled(x, gathered)
        _check(x, mask, gathered, statistics[0], refuse_single)
        return statistics

    def normalize(self, x: Tensor, *arguments: Any) -> Tensor:
        """The operator ``shared_normalize``, whose ``count`` is infinite where the statistics were not the batch's."""
        return torch.ops.batchnorm.shared_normalize(x, *arguments, self.peers.name, self.peers.size, self.peers.rank)[0]


def _packed(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    return torch.cat([mean.new_full((1,), signature(x)), count.reshape(1), mean, m2])


def _pooled(x: Tensor, gathered: Tensor) -> Statistics:
    _, count, mean, m2 = gathered.split([1, 1, x.size(1), x.size(1)], dim=1)
    total, mean, m2 = pooled(count, mean, m2)
    return total.reshape(()), mean, m2


def _check(x: Tensor, mask: Tensor | None, gathered: Tensor, count: Tensor, refuse_single: bool) -> None:
    """What only all ranks together can know. The values of a transform's tensors cannot be read: nothing is checked."""
    compiling = torch.compiler.is_compiling()
    if not compiling and reference.composing():
        return
    # A rank with several values knows that there are several: only the others look. Where there is but one, all do.
    in_doubt = refuse_single and (mask is not None or x.size(0) * math.prod(x.shape[2:]) <= 1)
    if compiling:
        torch._assert_async((gathered[:, 0] == signature(x)).all(), "the ranks disagree in channels or dtype")
        if in_doubt:
            torch._assert_async(count != 1, "Expected more than 1 value per channel when training")
        return
    if x.device.type == "cpu":  # elsewhere reading it would make the processor wait for the device at every step
        check_signatures(x, gathered[:, 0])
    if in_doubt and count == 1:
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
    want_residual = wants_residual(ctx.activation, mask, ctx.needs_input_grad[5])
    affine = (weight, bias, residual, sign, mask, ctx.activation)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():

        def whole(*own: Tensor) -> Statistics:
            found, batch_mean, m2 = _pooled(x, gather(_packed(x, *own), peers))
            batch_invstd = torch.rsqrt(m2 / found.clamp(min=1) + ctx.eps)
            constant = count.isinf()
            return count, torch.where(constant, mean, batch_mean), torch.where(constant, invstd, batch_invstd)

        dx, dweight, dbias, dresidual = differentiable_backward(
            grad, x, affine, ctx.eps, want_residual, whole=whole, total=lambda sums: add_up(sums, peers)
        )
    else:
        sums = torch.ops.batchnorm.grad_sums(grad, x, mean, invstd, *affine)
        # Whether or not dx is asked for here: another process may need these sums for its own.
        totals = all_reduce(torch.cat(sums), peers).split(x.size(1))
        dx, dresidual = torch.ops.batchnorm.grad_input(grad, x, mean, invstd, *affine, count, *totals, want_residual)
        dbias, dweight = sums
    return (
        dx,
        None,
        None,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        residual_gradient(ctx, grad, dresidual, want_residual, ctx.needs_input_grad[5]),
        *(None,) * 7,
    )


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("shared_normalize", _shared_normalize, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::shared_normalize", _fake, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::shared_normalize", _backward, setup_context=_context, lib=_library)
