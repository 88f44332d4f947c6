"""The study's networks: the paper's multilayer perceptron and a small convnet, with the normalization as an argument.

Weights are drawn from a generator of their own, so that two variants with one seed begin with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

# The one line through which the study meets the layer that it studies.
from batchnorm.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm1d,
    DecorrelatedBatchNorm,
    GhostBatchNorm1d,
    IterNorm,
    NormOutsideGradient,
    WhitenedLinear,
)

Norm = Literal[
    "none",
    "batch",
    "batch-plain",
    "noisy",
    "renorm",
    "ghost",
    "group",
    "outside",
    "outside-whitening",
    "reprojected",
    "iternorm",
    "decorrelated",
]
Activation = Literal["sigmoid", "relu"]
NORMS = (BatchNorm1d, BatchNorm2d)
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}


class NoisyBatchNorm1d(nn.Module):
    """Batch normalization whose output is shaken: the control of Santurkar et al. 2018, section 2.2.

    ``y = a * BN(x) + b`` on ``(N, C)``, where at each training step and for each unit ``a`` is drawn from
    U(1 - scale, 1 + scale) and ``b`` from U(-shift, shift): the distribution that the next layer sees jumps at every
    step. In eval mode the noise is left out, as dropout is, unless ``always`` is set (to look at what training sees).
    """

    def __init__(self, features: int, shift: float, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = BatchNorm1d(features)
        self.shift = shift
        self.scale = scale
        self.always = False
        self._features = features
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(N, C)``, then scale and shift each unit by fresh noise."""
        y: Tensor = self.norm(x)
        if not (self.training or self.always):
            return y
        a, b = 2.0 * torch.rand(2, self._features, generator=self._generator) - 1.0
        return y * (1.0 + self.scale * a) + self.shift * b


class Binary(nn.Module):
    """Pixels of 0 to 255 to 0.0 or 1.0: on from the middle up. The paper's MNIST net takes "a 28x28 binary image"."""

    def forward(self, x: Tensor) -> Tensor:
        """Threshold any shape of unsigned bytes."""
        return (x >= 128).float()


class Pixels(nn.Module):
    """Pixels of 0 to 255 to floats of 0 to 1: images stay bytes until their batch comes."""

    def forward(self, x: Tensor) -> Tensor:
        """Scale any shape of unsigned bytes."""
        return x.float() / 255.0


def mlp(
    inputs: int,
    outputs: int,
    *,
    seed: int,
    layers: int = 3,
    width: int = 100,
    norm: Norm = "none",
    activation: Activation = "sigmoid",
    gain: float = 1.0,
    std: float | None = None,
    noise: tuple[float, float] = (0.0, 0.0),
    momentum: float = 0.1,
    ghost: int = 15,
    groups: int = 10,
    group_size: int = 20,
    refresh: int = 1,
    damping: float = 1e-5,
) -> nn.Sequential:
    """A multilayer perceptron ``(N, inputs) -> (N, outputs)``: ``layers`` times linear, normalization, activation.

    Ioffe & Szegedy 2015, section 4.1: three hidden layers of 100 sigmoid units. Normalization stands before the
    activation. Weights are Xavier normal times ``gain`` with sigmoid and He normal times ``gain`` with ReLU, or all
    from N(0, std^2) where ``std`` is given; biases 0.

    Args:
        norm: "none"; "batch"; "batch-plain", without gamma and beta; "noisy", see :class:`NoisyBatchNorm1d`; "renorm",
            "ghost" and "group", batch renormalization, ghost batches and group norm; "outside" and "outside-whitening",
            statistics that count as constants; "reprojected", every linear layer one whose input is whitened without
            changing what it computes; "iternorm" and "decorrelated", whitening with gradients through it.
        noise: the shift and scale of the noisy variant.
        momentum: the weight of the new value in the running averages of "batch", "renorm" and "ghost".
        ghost: the samples in a ghost batch.
        groups: of group norm, which divide ``width``.
        group_size: the units that are whitened together, which divides ``width``.
        refresh: "outside" and "outside-whitening" take statistics from every so many batches.
        damping: what "reprojected" adds to each variance, so that no step gets more than 1 / damping as long.
    """
    generator = torch.Generator().manual_seed(seed)
    shaking = torch.Generator().manual_seed(seed + 1_000_003)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts.append(_linear(inputs, width, activation, gain, generator, std))
        if norm == "noisy":
            parts.append(NoisyBatchNorm1d(width, *noise, shaking))
        elif norm == "renorm":
            parts.append(BatchRenorm1d(width, momentum=momentum))
        elif norm == "ghost":
            parts.append(GhostBatchNorm1d(width, momentum=momentum, virtual_batch_size=ghost))
        elif norm == "group":
            parts.append(nn.GroupNorm(groups, width))
        elif norm == "outside":
            parts.append(NormOutsideGradient(width, "mean-variance", refresh))
        elif norm == "outside-whitening":
            parts.append(NormOutsideGradient(width, "whitening", refresh, group_size))
        elif norm == "iternorm":
            parts.append(IterNorm(width, group_size))
        elif norm == "decorrelated":
            parts.append(DecorrelatedBatchNorm(width, group_size))
        elif norm not in ("none", "reprojected"):
            parts.append(BatchNorm1d(width, momentum=momentum, affine=norm == "batch"))
        parts.append(_ACTIVATIONS[activation]())
        inputs = width
    parts.append(_linear(inputs, outputs, activation, gain, generator, std))
    if norm == "reprojected":
        # It is first made with weights of its own, from the process's random state.
        with torch.random.fork_rng(devices=[]):
            parts = [WhitenedLinear.from_linear(p, eps=damping) if isinstance(p, nn.Linear) else p for p in parts]
    return nn.Sequential(*parts)


def convnet(
    channels: int,
    outputs: int,
    *,
    seed: int,
    width: int = 16,
    norm: Norm = "none",
    depth: int = 1,
    stages: int = 2,
) -> nn.Sequential:
    """A small convnet ``(N, channels, H, W) -> (N, outputs)``: in each of ``stages`` ``depth`` times 3x3 convolution,
    normalization, ReLU, then 2x2 pooling.

    ``width`` channels in the first stage, twice as many in each next. He normal weights, biases 0; global average
    pooling before the last, linear layer.

    Args:
        norm: "none", "batch" or "batch-plain".
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = []
    for planes in (width * 2**stage for stage in range(stages)):
        for _ in range(depth):
            convolution = torch.nn.utils.skip_init(nn.Conv2d, channels, planes, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(convolution.bias)
            parts.append(convolution)
            if norm != "none":
                parts.append(BatchNorm2d(planes, affine=norm == "batch"))
            parts.append(nn.ReLU())
            channels = planes
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _linear(channels, outputs, "relu", 1.0, generator)
    )


def last_hidden_activation(model: nn.Sequential) -> nn.Module:
    """The activation of the last hidden layer; its input is what the paper's Figure 1 shows."""
    return [part for part in model if isinstance(part, nn.Sigmoid | nn.ReLU)][-1]


def shake(model: nn.Module, always: bool) -> None:
    """Whether the noisy layers of ``model`` shake in eval mode too; nothing where there are none."""
    for part in model.modules():
        if isinstance(part, NoisyBatchNorm1d):
            part.always = always


def _linear(
    inputs: int,
    outputs: int,
    activation: Activation,
    gain: float,
    generator: torch.Generator,
    std: float | None = None,
) -> nn.Linear:
    # skip_init: torch's own initialization would draw from the process's random state for nothing.
    layer = torch.nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    if std is not None:
        nn.init.normal_(layer.weight, std=std, generator=generator)
    elif activation == "relu":
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    else:
        nn.init.xavier_normal_(layer.weight, generator=generator)
    with torch.no_grad():
        layer.weight.mul_(gain)
    nn.init.zeros_(layer.bias)
    return layer
