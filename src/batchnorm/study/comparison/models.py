"""The networks that are compared where the user gives none: stated, small, and with a place for a normalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.study.comparison.data import Batch

Norm = Callable[[int], nn.Module]


class Sequences(nn.Module):
    """Two convolutions over (N, C, L) of 64 channels and width 5, each with its normalization and ReLU, the mean over
    the real positions, and a linear layer. Padding is left out of every statistic and of the mean, and stays zero."""

    def __init__(self, channels: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv1d(channels, 64, 5, padding=2), nn.Conv1d(64, 64, 5, padding=2)])
        self.norms = nn.ModuleList([norm(64), norm(64)])
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(N, C, L), and (N,) lengths where sequences differ in length, to (N, outputs)."""
        if lengths is None:
            lengths = torch.full((len(x),), x.size(2), device=x.device)
        real = (torch.arange(x.size(2), device=x.device) < lengths.unsqueeze(1)).unsqueeze(1).to(x.dtype)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(_normed(norm, convolution(x), lengths)) * real
        pooled: Tensor = x.sum(2) / lengths.clamp_min(1).unsqueeze(1).to(x.dtype)
        found: Tensor = self.head(pooled)
        return found


def _normed(norm: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    y: Tensor = norm(x, lengths=lengths)
    return y


@dataclass(frozen=True)
class Default:
    """The default network for inputs of a shape (without N): called with a normalization, it makes one.

    ``shape`` (d,): three hidden layers of 128; (C, H, W): three 3x3 convolutions of 32, 64 and 128 channels, the first
    two followed by a max-pooling where the image is large enough; (C, L): :class:`Sequences`. ReLU everywhere, torch's
    own initialisation, each normalization between a linear layer and its ReLU.
    """

    shape: tuple[int, ...]
    outputs: int

    @property
    def __name__(self) -> str:
        return {1: "the default MLP", 2: "the default sequence net", 3: "the default convnet"}[len(self.shape)]

    def __call__(self, norm: Norm) -> nn.Module:
        """The network."""
        if len(self.shape) == 2:
            return Sequences(self.shape[0], self.outputs, norm)
        layers: list[nn.Module] = []
        before = self.shape[0]
        if len(self.shape) == 1:
            for width in (128, 128, 128):
                layers += [nn.Linear(before, width), norm(width), nn.ReLU()]
                before = width
            return nn.Sequential(*layers, nn.Linear(before, self.outputs))
        side = min(self.shape[1:])
        for place, width in enumerate((32, 64, 128)):
            layers += [nn.Conv2d(before, width, 3, padding=1), norm(width), nn.ReLU()]
            if place < 2 and side >= 4:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, self.outputs))

    @property
    def description(self) -> str:
        """In a sentence."""
        return {
            1: "No model was given: the default MLP, three hidden layers of 128 with ReLU.",
            2: "No model was given: the default sequence net, two convolutions of width 5 and 64 channels, and the "
            "mean over real positions.",
            3: "No model was given: the default convnet, three 3x3 convolutions of 32, 64 and 128 channels.",
        }[len(self.shape)]


def default_for(batch: Batch, outputs: int) -> Default:
    """The default network for such batches."""
    first = batch.inputs[0] if isinstance(batch.inputs, tuple) else batch.inputs
    shape = tuple(first.shape[1:])
    if len(shape) not in (1, 2, 3):
        from batchnorm._errors import InputError

        raise InputError(
            f"expected samples of shape (d,), (C, L) or (C, H, W) for a default network, got {shape}: give a model"
        )
    return Default(shape, outputs)
