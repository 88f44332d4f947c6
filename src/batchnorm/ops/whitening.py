"""Whitening over a batch, per group of channels, as a function of its tensors.

For each group of G channels, with mean and biased covariance S of its channel vectors over batch and positions::

    x_hat = W (x - mean),   W = (S + eps I)^(-1/2),   z = gamma x_hat + beta

W is symmetric (ZCA), which keeps x_hat as near to x as a whitened vector can be. How it is found is a
:data:`~batchnorm.ops.roots.Root`.

In eager mode :class:`Whiten` computes z and its closed-form gradient; it reads x twice each way and keeps x alone. For
everything else (torch.func, forward mode, the compiler, gradients of gradients) there is :func:`reference`, which is
the same in plain torch and float64.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.ops import averages
from batchnorm.ops import reference as operators
from batchnorm.ops.activations import activate
from batchnorm.ops.arguments import real_values, single_value
from batchnorm.ops.functional import OnSingleValue
from batchnorm.ops.grouped import Groups
from batchnorm.ops.per_sample import laid_out
from batchnorm.ops.reference import selected
from batchnorm.ops.roots import Root
from batchnorm.ops.schema import statistics_dtype


class Batch(NamedTuple):
    """What a batch was whitened with, outside the gradient: number (), mean (C,), biased covariance (g, G, G)."""

    number: Tensor
    mean: Tensor
    cov: Tensor


class Given(NamedTuple):
    """Constant statistics: mean (C,) and W (g, G, G), both of the statistics' dtype."""

    mean: Tensor
    matrix: Tensor


class Plan(NamedTuple):
    """What whitening needs besides tensors that have gradients.

    Attributes:
        given: these statistics are used, not the batch's.
        single: these are used where the batch has a single value per channel, which only the device may know.
    """

    group_size: int
    root: Root
    mask: Tensor | None = None
    given: Given | None = None
    single: Given | None = None


def batch_whitening(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None, Tensor | None],
    plan: Plan,
    *,
    momentum: float | None,
    ddof: int,
    activation: str,
    on_single_value: OnSingleValue,
) -> Tensor:
    """A training step: whiten with the batch's statistics and move the running ones, (mean, cov, number of batches).

    ``affine``: weight and bias, (C,) or (N, C), and residual. Arguments are those of
    :func:`batchnorm.ops.functional.batch_norm` otherwise, and have been checked.
    """
    values = values_per_channel(x, plan.mask)
    mean, cov, _ = running
    if values is None or values == 1:
        if values == 1 and on_single_value == "raise":
            raise single_value(x, plan.mask)
        other = population(x, mean, cov, plan) if on_single_value == "running" else identity(x, plan.group_size)
        if values == 1:
            return whiten(x, *affine, plan._replace(given=other), activation)[0]
        if on_single_value != "raise":
            plan = plan._replace(single=other)
    y, batch = whiten(x, *affine, plan, activation)
    assert batch is not None
    count = batch.number if plan.single is None else torch.where(batch.number == 1, 0, batch.number)
    averages.update(*running, batch.mean, batch.cov, count, momentum, ddof, masked=plan.mask is not None)
    return y


def values_per_channel(x: Tensor, mask: Tensor | None) -> int | None:
    """How many a statistic is made of, or None where asking would wait for a device or break a trace."""
    return x.size(0) * math.prod(x.shape[2:]) if mask is None else real_values(mask)


def population(x: Tensor, mean: Tensor | None, cov: Tensor | None, plan: Plan) -> Given:
    """The running statistics as constants: the matrix is made of the covariance each time, and never out of date."""
    assert mean is not None
    assert cov is not None
    wide = statistics_dtype(x.device)
    # A copy: a later training step moves the buffers in place, and the backward of this call must not notice.
    return Given(mean.detach().to(wide, copy=True), plan.root.matrix(cov.detach().to(wide)))


def identity(x: Tensor, group_size: int) -> Given:
    """Statistics that leave x as it is."""
    eye = torch.eye(group_size, dtype=statistics_dtype(x.device), device=x.device)
    return Given(eye.new_zeros(x.size(1)), eye.repeat(x.size(1) // group_size, 1, 1))


def statistics(x: Tensor, group_size: int, mask: Tensor | None) -> Batch:
    """Those of a batch, outside the gradient."""
    x = x.detach()
    if x.is_meta or torch.compiler.is_compiling() or operators.composing():
        count, mean, _ = operators.stats(x, mask)
        return Batch(count, mean, _reference_cov(_groups(x, mean, mask, group_size), count))
    with torch.no_grad(), full_precision(x):
        return _statistics(x, group_size, mask)[0]


def whiten(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, plan: Plan, activation: str
) -> tuple[Tensor, Batch | None]:
    """y = activation(z + residual), zero where the mask is False; and the batch's statistics unless they were given."""
    own = any(each is not None and each.dim() == 2 for each in (weight, bias))  # one for each sample
    inside = (None, None) if own else (weight, bias)
    if x.is_meta or torch.compiler.is_compiling() or operators.composing() or plan.single is not None:
        z, batch = reference(x, *inside, plan)
    else:
        z, *statistics = Whiten.apply(x, *inside, plan)
        batch = None if plan.given is not None else Batch(*statistics)
    if own:
        z = _affine(z, weight, bias)
    if residual is not None:
        z = z + selected(residual, plan.mask)
    # Selected at the end: the activation of beta need not be 0.
    return selected(activate(z, activation), plan.mask), batch


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Plan) -> tuple[Tensor, Batch | None]:
    """z and the batch's statistics in plain torch and float64: readable, and open to every transform."""
    batch = None
    if plan.given is not None:
        mean, matrix = plan.given
        groups = _groups(x, mean, plan.mask, plan.group_size)
    else:
        count, mean, _ = operators.stats(x, plan.mask)
        groups = _groups(x, mean, plan.mask, plan.group_size)
        cov = _reference_cov(groups, count)
        matrix = plan.root.differentiable(cov)
        batch = Batch(count, mean.detach(), cov.detach())
        if plan.single is not None:
            matrix = torch.where(count == 1, plan.single.matrix, matrix)
            mean = torch.where(count == 1, plan.single.mean, mean)
            groups = _groups(x, mean, plan.mask, plan.group_size)
    z = (groups @ matrix.mT).transpose(0, 1).reshape(groups.size(1), x.size(1))
    z = _affine(z, weight, bias)
    z = z.reshape(x.size(0), *x.shape[2:], x.size(1)).movedim(-1, 1)
    return laid_out(x, z.to(x.dtype)), batch


class Whiten(torch.autograd.Function):
    """z and, where they are not given, count, mean and cov; with the gradient of z.

    For A = diag(gamma) W and m positions, with all sums over positions and K = sum dz (x - mean)^T::

        dbeta = sum dz,   dgamma = diag(K W),   dW = diag(gamma) K
        dS    = the symmetric gradient of W's root (roots.py)
        dx    = A^T dz - A^T dbeta / m + 2/m dS (x - mean)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Plan) -> Any:
        """Saves x and what is of the size of a covariance."""
        with full_precision(x):
            if plan.given is None:
                (count, mean, cov), groups = _statistics(x, plan.group_size, plan.mask)
                matrix, saved = plan.root.solve(cov)
            else:
                mean, matrix = plan.given
                count, cov, saved = mean.new_empty(0), mean.new_empty(0), ()
                groups = Groups(x, plan.group_size, mean, plan.mask)
            scaled = _rows_times(weight, matrix)
            offset = mean.new_zeros(mean.shape) if bias is None else bias.to(mean.dtype)
            z = groups.apply(scaled, offset if groups.rest is None else offset - _times(scaled, groups.rest))
        ctx.plan = plan
        ctx.save_for_backward(x, weight, bias, plan.mask, count, mean, matrix, scaled, *saved)
        ctx.mark_non_differentiable(count, mean, cov)
        ctx.set_materialize_grads(False)
        return z, count, mean, cov

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """Differentiable itself where it is asked to be, through :func:`reference`."""
        if grad is None:
            return (None,) * 4
        x, weight, bias, mask, count, mean, matrix, scaled, *saved = ctx.saved_tensors
        plan: Plan = ctx.plan
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (*_differentiable_backward(grad, (x, weight, bias), ctx.needs_input_grad[:3], plan), None)
        dx = dweight = dbias = None
        with full_precision(x):
            groups = Groups(x, plan.group_size, mean, mask)
            dz = groups.view(grad)
            if need_weight or need_bias or plan.given is None:
                products, sums = groups.cross(dz)
                if groups.rest is not None:
                    products -= sums.view(-1, plan.group_size, 1) * groups.rest.view(-1, 1, plan.group_size)
            if need_weight:
                dweight = (products * matrix).sum(-1).flatten().to(weight.dtype)
            if need_bias:
                dbias = sums.to(bias.dtype)
            if need_x and plan.given is not None:
                dx = groups.apply_both(scaled.mT, dz, None, None)
            elif need_x:
                n = count.clamp(min=1)
                push = plan.root.pull(tuple(saved), _rows_times(weight, products)) * (2 / n)
                offset = -_times(scaled.mT, sums / n)
                dx = groups.apply_both(
                    scaled.mT, dz, push, offset if groups.rest is None else offset - _times(push, groups.rest)
                )
        return dx, dweight, dbias, None


def _differentiable_backward(
    grad: Tensor, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], plan: Plan
) -> list[Tensor | None]:
    with torch.enable_grad():
        # New names for the same values, so that the gradient stops here and still reaches them when differentiated.
        x, weight, bias = (None if each is None else each.view_as(each) for each in inputs)
        assert x is not None
        z, _ = reference(x, weight, bias, plan)
        wanted = [each for each, needed in zip((x, weight, bias), needs, strict=True) if needed and each is not None]
        found = iter(torch.autograd.grad(z, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def full_precision(x: Tensor) -> Any:
    """Out of autocast, which would round the factors of a product to half precision."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where x is; torch does not answer for the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _rows_times(weight: Tensor | None, matrices: Tensor) -> Tensor:
    """diag(weight) times the matrices of the groups."""
    return matrices if weight is None else weight.to(matrices.dtype).view(matrices.size(0), -1, 1) * matrices


def _times(matrices: Tensor, channels: Tensor) -> Tensor:
    return (matrices @ channels.view(matrices.size(0), -1, 1)).flatten()


def _statistics(x: Tensor, group_size: int, mask: Tensor | None) -> tuple[Batch, Groups]:
    count, mean, _ = torch.ops.batchnorm.stats(x, mask)
    groups = Groups(x, group_size, mean, mask)
    cov = groups.grams() / count.clamp(min=1)
    if groups.rest is not None:
        # The mean of x - shift is what rounding the shift left out.
        rest = groups.rest.view(-1, group_size, 1)
        cov -= rest * rest.mT
    return Batch(count, mean, cov), groups


def _groups(x: Tensor, mean: Tensor, mask: Tensor | None, group_size: int) -> Tensor:
    """x - mean as (g, M, G), zero where nothing real stands."""
    rows = x.movedim(1, -1).reshape(-1, x.size(1)).to(mean.dtype)
    if mask is None:
        rows = rows - mean
    else:
        real = mask.reshape(-1, 1)
        # Selected before the difference too: the gradient of what is left out must not meet a NaN.
        rows = torch.where(real, torch.where(real, rows, 0) - mean, 0)
    return rows.reshape(rows.size(0), -1, group_size).transpose(0, 1)


def _reference_cov(groups: Tensor, count: Tensor) -> Tensor:
    return groups.mT @ groups / count.clamp(min=1)


def _affine(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """gamma z + beta, for (C,) beside rows (M, C), and (N, C) beside (N, C, *)."""
    for coefficient, combine in ((weight, torch.mul), (bias, torch.add)):
        if coefficient is not None:
            own = coefficient.to(z.dtype)
            z = combine(z, own if own.dim() == 1 else own.expand(z.shape[:2])[(..., *[None] * (z.dim() - 2))])
    return z
