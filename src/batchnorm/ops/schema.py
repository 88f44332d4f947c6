"""The operators of a batch-normalization layer, as ``torch.library`` schemas.

Every implementation (the reference, C++, Triton) has these signatures and keeps these rules:

- ``x`` is (N, C) or (N, C, *spatial), floating point, with any strides. ``y`` and ``dx`` have x's dtype and the
  strides of ``torch.empty_like(x)``.
- ``mask`` is boolean (N, *spatial), True where a position is real; None where all are. Statistics and sums are over
  real positions only; y, dx and the residual's gradient are zero elsewhere, whatever stands there (NaN too).
- Statistics (``mean``, ``var``, ``invstd``, ``m2``, the sums) are (C,) and ``count`` is (), all of
  :func:`statistics_dtype`: a float32 mean of 1e4 is wrong by 5e-4 standard deviations before any kernel has begun.
  They are accurate to rounding; of float16 and bfloat16 data, and of float32 on a GPU, to that of float32, because
  kernels may add a few such values in float32 first.
- ``var`` is the biased variance m2 / count. Where count is 0, mean, m2 and var are 0.
- ``weight`` and ``bias`` are (C,) or None, which stand for 1 and 0; ``residual`` has x's shape.
- ``activation`` is one of :data:`ACTIVATIONS` and is applied to z = weight * x_hat + bias + residual.
- ``sign`` saves what the backward of a piecewise linear activation needs of z, where z cannot be recomputed from x
  alone (there is a residual): one bit an element, 1 where not z <= 0, eight to a byte from the lowest bit. Elements
  come in runs (see :func:`runs`), each of which begins a new byte, so that threads never share one. It is empty where
  it is not needed. Smooth activations take ``residual`` again.

The operators:

``stats``
    count, mean and m2 = sum (x - mean)^2 of a channel.
``normalize``
    y = activation(weight * (x - mean) * invstd + bias + residual), for given mean and invstd.
``train_forward``
    Algorithm 1 of Ioffe & Szegedy (2015) in one call: the statistics of the batch and y.
``grad_sums``
    sum dz and sum dz * x_hat, with dz the gradient of z: the gradients of bias and weight, and what ranks must add up.
``grad_input``
    dx for given sums, and dz as the residual's gradient where ``want_residual``.
``train_backward``
    ``grad_sums`` and ``grad_input`` in one call.
``ghost_forward``, ``ghost_backward``, ``ghost_update``
    ``train_forward``, ``train_backward`` and ``update_running`` for each virtual batch of ``size`` samples (see
    :mod:`batchnorm.ops.ghost`).
``update_running``
    moves running_mean and running_var towards the batch's by ``momentum``, or by 1 / num_batches where momentum is
    None; nothing moves where count is 0.
"""

from __future__ import annotations

import math

import torch

NAMESPACE = "batchnorm"

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "hardswish")
PIECEWISE_LINEAR = frozenset({"relu", "leaky_relu"})
LEAKY_SLOPE = 0.01  # torch's default

_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"
_RUNNING = "float? momentum, Tensor? num_batches, int ddof"
_GRAD = f"Tensor grad, Tensor x, Tensor mean, Tensor invstd, {_AFFINE}, Tensor? sign, Tensor? mask, str activation"

SCHEMAS = {
    "stats": "(Tensor x, Tensor? mask) -> (Tensor count, Tensor mean, Tensor m2)",
    "normalize": f"(Tensor x, Tensor mean, Tensor invstd, {_AFFINE}, Tensor? mask, str activation)"
    " -> (Tensor y, Tensor sign)",
    "train_forward": f"(Tensor x, {_AFFINE}, Tensor? mask, float eps, str activation)"
    " -> (Tensor y, Tensor count, Tensor mean, Tensor var, Tensor invstd, Tensor sign)",
    "grad_sums": f"({_GRAD}) -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    "grad_input": f"({_GRAD}, Tensor count, Tensor sum_dz, Tensor sum_dz_xhat, bool want_residual)"
    " -> (Tensor dx, Tensor dresidual)",
    "train_backward": f"({_GRAD}, Tensor count, bool want_residual)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "update_running": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor count, "
    f"{_RUNNING}) -> ()",
    "ghost_forward": f"(Tensor x, {_AFFINE}, Tensor? mask, int size, SymInt ghosts, float eps, str activation)"
    " -> (Tensor y, Tensor saved, Tensor sign)",
    "ghost_backward": f"(Tensor grad, Tensor x, Tensor saved, {_AFFINE}, Tensor? sign, Tensor? mask, int size, "
    "str activation, bool want_residual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "ghost_update": f"(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor saved, {_RUNNING}) -> ()",
    "infer": f"(Tensor x, Tensor running_mean, Tensor running_var, {_AFFINE}, Tensor? mask, float eps, str activation)"
    " -> Tensor y",
    "train_step": f"(Tensor x, {_AFFINE}, Tensor? mask, Tensor(a!)? running_mean, Tensor(b!)? running_var, float eps, "
    f"{_RUNNING}, str activation) -> (Tensor y, Tensor saved, Tensor sign)",
    "train_step_backward": f"(Tensor grad, Tensor x, Tensor saved, {_AFFINE}, Tensor? sign, Tensor? mask, "
    "str activation, bool want_residual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
}


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on the devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def needs_sign(activation: str, residual: torch.Tensor | None) -> bool:
    """Whether the backward needs the saved signs of z: it cannot recompute them where a residual was added."""
    return residual is not None and activation in PIECEWISE_LINEAR


def runs(x: torch.Tensor) -> tuple[bool, int, int]:
    """How ``sign`` follows the elements of x: (by rows?, number of runs, length of a run).

    By rows: the channels of one position, positions in their logical order; that is (N, C) and channels-last memory.
    Otherwise by planes: the positions of one channel of one sample, as in contiguous memory.
    """
    n, channels, positions = x.size(0), x.size(1), math.prod(x.shape[2:])
    spatial = range(2, x.dim())
    planes, rows = _dense(x, (0, 1, *spatial)), _dense(x, (0, *spatial, 1))
    by_rows = rows and (not planes or channels > positions) if planes or rows else positions == 1
    return (True, n * positions, channels) if by_rows else (False, n * channels, positions)


def _dense(x: torch.Tensor, order: tuple[int, ...]) -> bool:
    expected = 1
    for dim in reversed(order):
        if x.size(dim) != 1 and x.stride(dim) != expected:
            return False
        expected *= x.size(dim)
    return True


def needs_residual(activation: str) -> bool:
    """Whether the backward needs the residual itself, to recompute z for a smooth activation."""
    return activation not in PIECEWISE_LINEAR and activation != "none"
