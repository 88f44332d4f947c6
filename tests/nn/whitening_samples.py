"""What the tests of the whitening layers share: layers, correlated input, the papers' matrices."""

from __future__ import annotations

import pytest
import torch

from batchnorm.nn import DecorrelatedBatchNorm, IterNorm
from oracles import whitening as oracle

LAYERS = {"dbn": DecorrelatedBatchNorm, "iternorm": IterNorm}
layers = pytest.mark.parametrize("kind", LAYERS)


def root(kind, eps=1e-5):
    if kind == "dbn":
        return lambda cov: oracle.zca(cov, eps, 1e-6)
    return lambda cov: oracle.newton(cov, eps, 5)


def correlated(shape, mean=0.0, dtype=torch.float32):
    """Channels that depend on each other, with deviations from 0.3 to 3."""
    channels = shape[1]
    mix = torch.randn(channels, channels, dtype=torch.float64) / channels**0.5 + torch.eye(channels)
    x = torch.einsum("ij,nj...->ni...", mix, torch.randn(shape, dtype=torch.float64))
    scale = torch.linspace(0.3, 3, channels, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return (x * scale + mean).to(dtype).contiguous()


def made(kind, channels, group_size, dtype=torch.float32, **kwargs):
    layer = LAYERS[kind](channels, group_size, dtype=dtype, **kwargs)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.uniform_(-1, 1)
    return layer


def affine(layer):
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
