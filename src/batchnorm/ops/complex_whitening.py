"""Batch normalization of complex numbers: real and imaginary part whitened together.

Dividing by one deviation would leave a distribution that is longer in one direction of the complex plane as it is. So
the pair is multiplied by the inverse square root of its 2 x 2 covariance, and gamma is a symmetric 2 x 2 matrix.

Covariances and gamma are three numbers a channel, (..., 3): those of rr, ii and ri. Means and beta are two, (..., 2).

Source: Trabelsi et al. (2018), "Deep Complex Networks", section 3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.activations import activate
from batchnorm.ops.reference import selected
from batchnorm.ops.schema import statistics_dtype


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, as wide as statistics are."""
    dtype = statistics_dtype(x.device)
    return x.real.to(dtype), x.imag.to(dtype)


def stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """count, mean (C, 2) and biased covariance (C, 3), over real positions."""
    real, imaginary = parts(selected(x, mask))  # selected first: NaN outside the mask must not reach the gradient
    count, mean_r, m2_r = reference.stats(real, mask)
    _, mean_i, m2_i = reference.stats(imaginary, mask)
    products = (real - _row(mean_r, x)) * (imaginary - _row(mean_i, x))
    cross = selected(products, mask).sum([0, *range(2, x.dim())])
    return count, torch.stack([mean_r, mean_i], -1), torch.stack([m2_r, m2_i, cross], -1) / count.clamp(min=1)


def inverse_root(covariance: Tensor, eps: float) -> Tensor:
    """(V + eps I)^(-1/2) of 2 x 2 matrices, in closed form, by the root s of the determinant and the trace.

    The square root of a matrix A is (A + s I) / sqrt(trace + 2 s), and its inverse has its determinant, s, below the
    line. The determinant is that of V, which rounding must not take below zero, and what eps adds to it: for parts
    that are multiples of each other only that is left, and would drown in rr * ii - ri^2.
    """
    rr, ii, ri = covariance.unbind(-1)
    determinant = (rr * ii - ri * ri).clamp(min=0) + eps * (rr + ii) + eps * eps
    s = determinant.sqrt()
    scale = 1 / (s * (rr + ii + 2 * eps + 2 * s).sqrt())
    return torch.stack([(ii + eps + s) * scale, (rr + eps + s) * scale, -ri * scale], -1)


def normalize(
    x: Tensor,
    mean: Tensor,
    root: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    """y = activation(gamma root (x - mean) + beta + residual), of real and imaginary part each.

    mean, root, weight and bias have a leading (C,) or, one for each sample, (N, C).
    """
    real, imaginary = (part - _row(mean[..., i], x) for i, part in enumerate(parts(selected(x, mask))))
    for matrix in (root, weight):
        if matrix is not None:
            rr, ii, ri = (_row(entry.to(real.dtype), x) for entry in matrix.unbind(-1))
            real, imaginary = rr * real + ri * imaginary, ri * real + ii * imaginary
    if bias is not None:
        real, imaginary = (part + _row(bias[..., i].to(part.dtype), x) for i, part in enumerate((real, imaginary)))
    if residual is not None:
        added = parts(selected(residual, mask))
        real, imaginary = real + added[0], imaginary + added[1]
    dtype = x.real.dtype
    real, imaginary = (selected(activate(part, activation), mask).to(dtype) for part in (real, imaginary))
    return torch.complex(real, imaginary)


def _row(channels: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C), shaped so that it broadcasts over x."""
    leading = channels.shape if channels.dim() == 2 else (1, *channels.shape)
    return channels.reshape(*leading, *[1] * (x.dim() - 2))
