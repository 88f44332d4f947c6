"""Networks that were really trained, on scikit-learn's digits: a few hundred steps, seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


@cache
def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels, shuffled: 1200 to train on and 597 others."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(data.images, dtype=torch.float32)[order].unsqueeze(1) / 16
    labels = torch.tensor(data.target)[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def mlp(norm: Callable[[int], nn.Module] = nn.BatchNorm1d, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Three hidden layers of 100."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (64, 100, 100):
        layers += [nn.Linear(width, 100, bias=False), norm(100), activation()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def convnet(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Three convolutions, the second with stride 2."""
    layers: list[nn.Module] = []
    for before, width, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(
    model: nn.Module, steps: int = 300, batch: int = 60, rate: float = 0.1, seed: int = 0, by_class: bool = False
) -> nn.Module:
    """Plain SGD in shuffled batches; ``by_class``: batches of one class each."""
    images, labels, _, _ = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    model.train()
    for step in range(steps):
        if by_class:
            pool = (labels == step % 10).nonzero().squeeze(1)
            chosen = pool[torch.randint(len(pool), (batch,), generator=generator)]
        else:
            chosen = torch.randperm(len(images), generator=generator)[:batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def batches(size: int = 60, count: int = 8, seed: int = 0, held_out: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Shuffled batches (images, labels), of those that it was trained on or of the others."""
    images, labels = digits(seed)[2:] if held_out else digits(seed)[:2]
    return [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(count)]
