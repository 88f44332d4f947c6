"""The operators of ghost batch norm in plain torch: what :mod:`batchnorm.ops.reference` is to the others.

A batch is cut into virtual batches, "ghosts", of ``size`` samples each, the last with what is left; sample n belongs to
ghost min(n // size, ghosts - 1). Each is normalized with its own statistics. Without a loop: sums over the samples of a
ghost are sums over a reshaped tensor, and its statistics are handed back to its samples by another, after which the
formulas are the ordinary ones, with statistics of shape (N, C) in place of (C,).

``saved`` is (ghosts, 3 C + 1): mean, biased var and invstd of each channel, and the count.

Source: Hoffer, Hubara & Soudry (2017), "Train longer, generalize better", Algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.moments import bessel_factor
from batchnorm.ops import reference
from batchnorm.ops.reference import _grad_z, _input_gradient, _row, _x_hat, selected
from batchnorm.ops.schema import statistics_dtype


def number_of(x: Tensor, size: int) -> int:
    """How many ghosts of ``size`` samples a batch makes.

    The last is smaller where N is not divisible; but where it would have a single value a channel, of which no variance
    is to be had, it joins the one before.
    """
    # Written for sizes that torch.compile knows as symbols, too.
    whole, rest = x.size(0) // size, x.size(0) % size
    if rest != 0 and rest * math.prod(x.shape[2:]) != 1:
        whole = whole + 1
    return max(1, whole)


def ghost_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    size: int,
    ghosts: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of batch normalization in each ghost."""
    saved = statistics(x, mask, size, ghosts, eps)
    y, sign = reference.normalize(x, *of_samples(saved, size, x), weight, bias, residual, mask, activation)
    return y, saved, sign


def ghost_backward(
    grad: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    size: int,
    activation: str,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`ghost_forward`: dx as in each ghost alone, dweight and dbias summed over ghosts."""
    mean, _, invstd, count = _split(saved, x)
    invstd_of = _of_samples(invstd, size, x)
    x_hat = _x_hat(x, _of_samples(mean, size, x), invstd_of, mask)
    dz = _grad_z(grad, x, x_hat, weight, bias, residual, sign, mask, activation)
    sum_dz, sum_dz_xhat = (_of_ghosts(sums, size, saved.size(0)) for sums in (_summed(dz), _summed(dz * x_hat)))
    sums = _of_samples(sum_dz, size, x), _of_samples(sum_dz_xhat, size, x)
    dx = _input_gradient(dz, x_hat, invstd_of, weight, _of_samples(count, size, x), *sums, mask).to(x.dtype)
    dweight, dbias = sum_dz_xhat.sum(0), sum_dz.sum(0)
    return (
        dx,
        dweight if weight is None else dweight.to(weight.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
        dz.to(x.dtype) if want_residual else x.new_empty(0),
    )


def ghost_update(
    running_mean: Tensor,
    running_var: Tensor,
    saved: Tensor,
    momentum: float | None,
    num_batches: Tensor | None,
    ddof: int,
) -> None:
    """``update_running`` for one ghost after the other, collected. ``num_batches`` has counted those with real values.

    running = prod (1 - step_i) running + sum_i step_i prod_{j > i} (1 - step_j) batch_i
    """
    mean, var, _, count = _split(saved, running_mean.unsqueeze(0))
    if momentum is not None:
        step = torch.full_like(count, momentum)
    elif num_batches is not None:
        real = (count > 0).to(count.dtype)
        step = (num_batches - real.sum() + real.cumsum(0)).reciprocal()
    else:
        raise ValueError("expected a momentum or num_batches, got neither")
    moves = ((running_mean, mean, count > 0), (running_var, var * bessel_factor(count, ddof), count > ddof))
    for running, batch, known in moves:
        moves_it = known & (step != 0)
        kept = torch.where(moves_it, 1 - step, 1)
        from_here = kept.flip(0).cumprod(0).flip(0)  # prod over j >= i
        weight = step * torch.cat([from_here[1:], torch.ones_like(kept[:1])])
        # Selected, not multiplied by zero: zero times NaN is NaN.
        new = torch.where(moves_it, weight * batch, 0).sum(0)
        old = running.to(new.dtype)
        running.copy_(torch.where(moves_it.any(), from_here[0] * old + new, old))


def statistics(x: Tensor, mask: Tensor | None, size: int, ghosts: int, eps: float) -> Tensor:
    """``saved``, as a differentiable function of x."""
    wide = selected(x.to(statistics_dtype(x.device)), mask)
    real = wide.new_ones(x.size(0), 1, *x.shape[2:]) if mask is None else mask.unsqueeze(1).to(wide.dtype)
    count = _of_ghosts(_summed(real), size, ghosts)
    n = count.clamp(min=1)
    mean = _of_ghosts(_summed(wide), size, ghosts) / n
    centred = selected(wide - _row(_of_samples(mean, size, x), x), mask)
    var = _of_ghosts(_summed(centred * centred), size, ghosts) / n
    return torch.cat([mean, var, torch.rsqrt(var + eps), count], 1)


def of_samples(saved: Tensor, size: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and invstd that each sample is normalized with, (N, C)."""
    mean, _, invstd, _ = _split(saved, x)
    return _of_samples(mean, size, x), _of_samples(invstd, size, x)


def _summed(x: Tensor) -> Tensor:
    """(N, C, *spatial) summed over positions: (N, C)."""
    return x.flatten(2).sum(2) if x.dim() > 2 else x


def _split(saved: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, var, invstd, each (ghosts, C), and count (ghosts, 1)."""
    channels = x.size(1)
    mean, var, invstd, count = saved.split([channels, channels, channels, 1], 1)
    return mean, var, invstd, count


def _of_ghosts(of_samples: Tensor, size: int, ghosts: int) -> Tensor:
    """(N, C) summed over each ghost's samples: (ghosts, C)."""
    whole = (ghosts - 1) * size
    first = of_samples[:whole].reshape(ghosts - 1, size, of_samples.size(1)).sum(1)
    return torch.cat([first, of_samples[whole:].sum(0, keepdim=True)])


def _of_samples(of_ghosts: Tensor, size: int, x: Tensor) -> Tensor:
    """(ghosts, C) repeated for each ghost's samples: (N, C)."""
    whole, channels = (of_ghosts.size(0) - 1) * size, of_ghosts.size(1)
    first = of_ghosts[:-1].unsqueeze(1).expand(-1, size, -1).reshape(whole, channels)
    return torch.cat([first, of_ghosts[-1:].expand(x.size(0) - whole, -1)])
