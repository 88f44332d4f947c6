"""The operators of :mod:`batchnorm.ops.schema` in plain torch, in the paper's order and letters.

Three uses: the readable algorithm, the implementation for devices without a faster one, and the oracle for those that
have one. It computes in float64 (float32 on devices without) and rounds once at the end. It is made of differentiable
torch functions only, so that ``torch.func`` transforms and forward-mode derivatives pass straight through it.

Source: Ioffe & Szegedy (2015), "Batch Normalization", Algorithm 1 (forward) and section 3 (backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from batchnorm.moments import bessel_factor
from batchnorm.ops.activations import activate, activation_slope, kinked_slope
from batchnorm.ops.schema import needs_sign, runs, statistics_dtype


def stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """count = sum 1; mean = 1/count sum x; m2 = sum (x - mean)^2, over real positions."""
    x = selected(_wide(x), mask)
    axes = _batch_axes(x)
    # new_full: new_tensor would make a constant of a size that torch.export has been told is not one.
    count = x.new_full((), x.size(0) * math.prod(x.shape[2:])) if mask is None else mask.sum().to(x.dtype)
    mean = x.sum(axes) / count.clamp(min=1)
    centred = selected(x - _row(mean, x), mask)
    m2 = (centred * centred).sum(axes)
    return count, mean, m2


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """x_hat = (x - mean) * invstd; y = activation(weight * x_hat + bias + residual)."""
    z = _preactivation(_x_hat(x, mean, invstd, mask), weight, bias, residual, mask)
    y = selected(activate(z, activation), mask).to(x.dtype)
    # Under a torch.func transform z has no memory to lay out; there the activation is differentiated as it stands.
    saved = needs_sign(activation, residual) and not composing()
    sign = _pack(z, x) if saved else x.new_empty(0, dtype=torch.uint8)
    return y, sign


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    *,
    stats: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]] = stats,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1: mean and var over the mini-batch, normalize, scale and shift."""
    count, mean, m2 = stats(x, mask)
    var = m2 / count.clamp(min=1)
    invstd = torch.rsqrt(var + eps)
    y, sign = normalize(x, mean, invstd, weight, bias, residual, mask, activation)
    return y, count, mean, var, invstd, sign


def grad_sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """dl/dbeta = sum dz and dl/dgamma = sum dz * x_hat."""
    x_hat = _x_hat(x, mean, invstd, mask)
    return _sums(_grad_z(grad, x, x_hat, weight, bias, residual, sign, mask, activation), x_hat)


def grad_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
    count: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    want_residual: bool,
) -> tuple[Tensor, Tensor]:
    """dx = weight * invstd * (dz - sum_dz / count - x_hat * sum_dz_xhat / count).

    That is the paper's chain through mean and var, collected. With sums of zero it is the gradient for constant
    statistics.
    """
    x_hat = _x_hat(x, mean, invstd, mask)
    dz = _grad_z(grad, x, x_hat, weight, bias, residual, sign, mask, activation)
    dx = _input_gradient(dz, x_hat, invstd, weight, count, sum_dz, sum_dz_xhat, mask).to(x.dtype)
    return dx, dz.to(x.dtype) if want_residual else x.new_empty(0)


def train_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
    count: Tensor,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`train_forward`, for the mean and invstd that it returned."""
    x_hat = _x_hat(x, mean, invstd, mask)
    dz = _grad_z(grad, x, x_hat, weight, bias, residual, sign, mask, activation)
    sum_dz, sum_dz_xhat = _sums(dz, x_hat)
    dx = _input_gradient(dz, x_hat, invstd, weight, count, sum_dz, sum_dz_xhat, mask).to(x.dtype)
    # dgamma and dbeta come in the parameter's dtype, or as they are where there is no parameter.
    dweight = sum_dz_xhat if weight is None else sum_dz_xhat.to(weight.dtype)
    dbias = sum_dz if bias is None else sum_dz.to(bias.dtype)
    return dx, dweight, dbias, dz.to(x.dtype) if want_residual else x.new_empty(0)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    num_batches: Tensor | None,
    ddof: int,
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place; var with Bessel's correction for ddof=1."""
    if momentum is not None:
        step = torch.full_like(count, momentum)
    elif num_batches is not None:
        step = num_batches.to(count.dtype).reciprocal()  # the cumulative average
    else:
        raise ValueError("expected a momentum or num_batches, got neither")
    # A batch without a single real value says nothing about the population; one with a single value (of a mask:
    # elsewhere that is refused) tells of the mean and not of an unbiased variance.
    moves = ((running_mean, mean, count > 0), (running_var, var * bessel_factor(count, ddof), count > ddof))
    for running, batch, known in moves:
        moved = (1 - step) * running.to(batch.dtype) + step * batch
        # Selected, not multiplied by zero: zero times NaN is NaN.
        running.copy_(torch.where(known & (step != 0), moved, running.to(batch.dtype)))


def infer(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """Algorithm 2, step 10: the same normalization with the population's statistics."""
    dtype = statistics_dtype(x.device)
    invstd = torch.rsqrt(running_var.to(dtype) + eps)
    return normalize(x, running_mean.to(dtype), invstd, weight, bias, residual, mask, activation)[0]


def train_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float | None,
    num_batches: Tensor | None,
    ddof: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`train_forward` and :func:`update_running`; mean, invstd and count in one tensor."""
    y, count, mean, var, invstd, sign = train_forward(x, weight, bias, residual, mask, eps, activation)
    if running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, var, count, momentum, num_batches, ddof)
    return y, torch.cat([mean, invstd, count.reshape(1)]), sign


def train_step_backward(
    grad: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`train_backward` from what :func:`train_step` saved."""
    mean, invstd, count = saved.split([x.size(1), x.size(1), 1])
    affine = (weight, bias, residual, sign, mask, activation)
    return train_backward(grad, x, mean, invstd, *affine, count.reshape(()), want_residual)


def _grad_z(
    grad: Tensor,
    x: Tensor,
    x_hat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    dz = selected(_wide(grad), mask)
    if activation == "none":
        return dz
    if sign is not None and sign.numel() > 0:
        slope = kinked_slope(_unpack(sign, x), activation, dz)
    else:
        slope = activation_slope(_preactivation(x_hat, weight, bias, residual, mask), activation)
    return selected(dz * slope, mask)


def _sums(dz: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    axes = _batch_axes(dz)
    return dz.sum(axes), (dz * x_hat).sum(axes)


def _input_gradient(
    dz: Tensor,
    x_hat: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    count: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    mask: Tensor | None,
) -> Tensor:
    n = count.clamp(min=1)
    dx = dz - _row(sum_dz / n, dz) - x_hat * _row(sum_dz_xhat / n, dz)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    return selected(dx * _row(scale, dz), mask)


def _preactivation(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    if weight is not None:
        z = z * _row(weight.to(z.dtype), z)
    if bias is not None:
        z = z + _row(bias.to(z.dtype), z)
    if residual is not None:
        z = z + selected(residual.to(z.dtype), mask)
    return z


def _x_hat(x: Tensor, mean: Tensor, invstd: Tensor, mask: Tensor | None) -> Tensor:
    x = _wide(x)
    return selected((x - _row(mean, x)) * _row(invstd, x), mask)


def composing() -> bool:
    """Whether only plain torch functions will do: for a torch.func transform, a forward-mode derivative, an export.

    Operators with a registered gradient know reverse mode only, and an exported program runs where this package is not.
    So while one of these is active the layers call this module directly, whose plain torch functions every transform
    and every exporter understands.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if torch._C._is_tracing():  # torch.jit.trace, and the older ONNX exporter
        return True
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _wide(x: Tensor) -> Tensor:
    return x.to(statistics_dtype(x.device))


def _batch_axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _row(channels: Tensor, x: Tensor) -> Tensor:
    """A (C,) vector, or one for each sample (N, C), shaped so that it broadcasts over x."""
    return channels.reshape([*(channels.shape[:-1] or [1]), channels.size(-1)] + [1] * (x.dim() - 2))


def selected(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros where nothing real stands; selected, because zero times NaN is NaN."""
    if mask is None:
        return x
    return torch.where(mask.unsqueeze(1), x, torch.zeros((), dtype=x.dtype, device=x.device))


def _pack(z: Tensor, x: Tensor) -> Tensor:
    """One bit an element of z, run by run (:func:`batchnorm.ops.schema.runs`)."""
    by_rows, number, length = runs(x)
    above = ~(z <= 0)
    bits = (above.movedim(1, -1) if by_rows else above).reshape(number, length).to(torch.uint8)
    bits = functional.pad(bits, (0, -length % 8)).reshape(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return (bits * powers).sum(1, dtype=torch.uint8)


def _unpack(sign: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`_pack`: boolean, of x's shape."""
    by_rows, number, length = runs(x)
    bits = (sign.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=x.device)) & 1
    above = bits.to(torch.bool).reshape(number, -1)[:, :length]
    if by_rows:
        return above.reshape(x.size(0), *x.shape[2:], x.size(1)).movedim(-1, 1)
    return above.reshape(x.shape)
