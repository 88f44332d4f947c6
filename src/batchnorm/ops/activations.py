"""The activations that an operator can end with, and their derivatives, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from batchnorm.ops.schema import LEAKY_SLOPE


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation itself."""
    match activation:
        case "none":
            return z
        case "relu":
            return functional.relu(z)
        case "leaky_relu":
            return functional.leaky_relu(z, LEAKY_SLOPE)
        case "silu":
            return functional.silu(z)
        case "gelu":
            return functional.gelu(z)
        case "hardswish":
            return functional.hardswish(z)
    raise ValueError(f"unknown activation {activation!r}")


def activation_layer(activation: str) -> torch.nn.Module:
    """The activation as torch's layer."""
    match activation:
        case "none":
            return torch.nn.Identity()
        case "relu":
            return torch.nn.ReLU()
        case "leaky_relu":
            return torch.nn.LeakyReLU(LEAKY_SLOPE)
        case "silu":
            return torch.nn.SiLU()
        case "gelu":
            return torch.nn.GELU()
        case "hardswish":
            return torch.nn.Hardswish()
    raise ValueError(f"unknown activation {activation!r}")


def activation_slope(z: Tensor, activation: str) -> Tensor:
    """Its derivative. At a kink it is torch's choice: 0 for relu at 0; a NaN passes the gradient on."""
    match activation:
        case "silu":
            s = torch.sigmoid(z)
            return s * (1 + z * (1 - s))
        case "gelu":
            density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
        case "hardswish":
            inner = torch.where(z <= -3, torch.zeros_like(z), z / 3 + 0.5)
            return torch.where(z < 3, inner, torch.ones_like(z))
    return kinked_slope(~(z <= 0), activation, z)


def kinked_slope(above: Tensor, activation: str, like: Tensor) -> Tensor:
    """The derivative of a piecewise linear activation, from where z is above its kink."""
    one = torch.ones_like(like)
    if activation == "none":
        return one
    return torch.where(above, one, LEAKY_SLOPE * one if activation == "leaky_relu" else torch.zeros_like(one))
