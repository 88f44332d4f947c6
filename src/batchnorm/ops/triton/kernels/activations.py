"""The activations and their slopes on float32 tiles, as :mod:`batchnorm.ops.activations` defines them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The activation itself. Written with ``z <= 0`` so that a NaN passes. SLOPE is a leaky ReLU's."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z <= 0, z * SLOPE, z)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        z = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        gate = z + 3.0
        gate = tl.where(gate < 0, 0.0, gate)
        gate = tl.where(gate > 6.0, 6.0, gate)
        z = z * gate * (1.0 / 6.0)
    return z


@triton.jit
def slope_times(grad, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """grad * activation'(z), torch's choice at a kink."""
    if ACTIVATION == "relu" or ACTIVATION == "leaky_relu":
        grad = kinked(grad, z <= 0, ACTIVATION, SLOPE)
    elif ACTIVATION == "silu":
        e = tl.exp(-z)
        s = 1.0 / (1.0 + e)
        # z (1 - s) as z e s, and 0 where e is infinite: z is far out on the left, and the slope is nothing there.
        grad = grad * tl.where(e > 3e38, 0.0, s * (1.0 + z * (e * s)))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(z * z * -0.5)
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        grad = grad * tl.where(density == 0.0, below, below + z * density)  # far out z may be infinite
    elif ACTIVATION == "hardswish":
        inner = tl.where(z <= -3.0, 0.0, z * (1.0 / 3.0) + 0.5)
        grad = grad * tl.where(z < 3.0, inner, 1.0)
    return grad


@triton.jit
def kinked(grad, below, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The gradient through a piecewise linear activation, from where z is not above its kink."""
    return tl.where(below, grad * SLOPE if ACTIVATION == "leaky_relu" else 0.0, grad)
