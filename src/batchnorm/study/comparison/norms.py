"""Normalizations of any rank: what a factory gets to call, and what surgery puts in the place of a batch norm.

A factory's normalization is called with a number of features and knows no more: these layers take (N, C) and
(N, C, *spatial) alike. All take ``mask`` and ``lengths``, so that a network of sequences can hand them to whichever
variant it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError, ShapeError
from batchnorm.nn import BatchNorm2d, BatchRenorm2d, DecorrelatedBatchNorm, GhostBatchNorm2d, IterNorm
from batchnorm.ops.arguments import positions
from batchnorm.surgery.conversion.policies import default_groups


def _any_rank(input: Tensor) -> None:
    if input.dim() < 2:
        raise ShapeError(f"expected an input of shape (N, C) or (N, C, *spatial), got {list(input.shape)}")


class Batch(BatchNorm2d):
    """:class:`batchnorm.nn.BatchNorm2d` for any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        _any_rank(input)


class Renorm(BatchRenorm2d):
    """:class:`batchnorm.nn.BatchRenorm2d` for any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        _any_rank(input)


class Ghost(GhostBatchNorm2d):
    """:class:`batchnorm.nn.GhostBatchNorm2d` for any rank."""

    def _check_input_dim(self, input: Tensor) -> None:
        _any_rank(input)


class TorchBatch(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` for any rank. torch's knows no lengths: padding counts."""

    def _check_input_dim(self, input: Tensor) -> None:
        _any_rank(input)

    def forward(self, input: Tensor, *, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """torch's, whatever is padding."""
        return super().forward(input)


class Nothing(nn.Module):
    """y = x + b, the part of a batch norm that is no normalization; y = x without a bias."""

    def __init__(self, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_parameter("bias", bias)

    def forward(
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,  # noqa: ARG002
        lengths: Tensor | None = None,  # noqa: ARG002
        residual: Tensor | None = None,
    ) -> Tensor:
        """(N, C, *) to the same; ``residual`` is added."""
        bias = self._parameters["bias"]
        y = input if bias is None else input + bias.reshape(-1, *[1] * (input.dim() - 2))
        return y if residual is None else y + residual


class Group(nn.GroupNorm):
    r"""Group norm (Wu & He 2018) that leaves padding out.

    For each sample and group, with mean and biased var over the group's channels and the sample's real positions,
    :math:`y = \gamma (x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon} + \beta`.

    Shape: input and output (N, C, \*spatial); ``mask`` (N, \*spatial); ``lengths`` (N,) for (N, C, L).
    """

    def forward(
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Normalize each sample by itself."""
        real = positions(input, mask, lengths)
        y = super().forward(input) if real is None else self._masked(input, real)
        return y if residual is None else y + residual

    def _masked(self, x: Tensor, real: Tensor) -> Tensor:
        n, c = x.shape[:2]
        grouped = x.reshape(n, self.num_groups, c // self.num_groups, -1).float()
        weight = real.reshape(n, 1, 1, -1).float()
        count = (weight.sum(-1, keepdim=True) * grouped.size(2)).clamp_min(1)
        mean = (grouped * weight).sum((2, 3), keepdim=True) / count
        var = ((grouped - mean).square() * weight).sum((2, 3), keepdim=True) / count
        y = ((grouped - mean) * (var + self.eps).rsqrt()).reshape(x.shape).to(x.dtype)
        shape = (1, c, *[1] * (x.dim() - 2))
        y = y if self.weight is None else y * self.weight.reshape(shape)
        return y if self.bias is None else y + self.bias.reshape(shape)


class Instance(Group):
    """Instance norm (Ulyanov et al. 2016): group norm with a group for each channel. Needs spatial positions."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, num_features)

    def forward(self, input: Tensor, **options: Any) -> Tensor:
        """Normalize each channel of each sample by itself.

        Raises:
            ShapeError: the input has one value a channel and sample, of which nothing would be left.
        """
        if input.dim() < 3:
            raise ShapeError(f"instance norm needs (N, C, *spatial), got {list(input.shape)}: leave this variant out")
        return super().forward(input, **options)


def largest_divisor(features: int, most: int) -> int:
    """The largest divisor of ``features`` up to ``most``."""
    return next(size for size in range(min(most, features), 0, -1) if features % size == 0)


def make(kind: str, size: int | None, features: int, batch: int) -> nn.Module:
    """The layer ``kind`` for ``features`` channels. ``size`` is its own: a ghost, the number of groups, a group.

    Raises:
        InputError: the size does not fit.
    """
    features = int(features)
    if kind in ("group", "iternorm", "decorrelated") and size is not None and features % size:
        raise InputError(f"{kind}={size} does not divide a layer's {features} channels: choose a divisor")
    if kind == "none":
        return Nothing()
    if kind == "batch":
        return Batch(features)
    if kind == "torch":
        return TorchBatch(features)
    if kind == "renorm":
        return Renorm(features)
    if kind == "ghost":
        return Ghost(features, virtual_batch_size=size or max(2, batch // 4))
    if kind == "group":
        # The input may be (N, C), where a group of one channel is 0 whatever the input, and one of two a sign.
        return Group(size or default_groups(features, 4), features)
    if kind == "layer":
        return Group(1, features)
    if kind == "instance":
        return Instance(features)
    # A covariance of more channels than a batch has samples has no full rank.
    group = size or largest_divisor(features, 16)
    return IterNorm(features, group) if kind == "iternorm" else DecorrelatedBatchNorm(features, group)


def takes_tensors(made: nn.Module, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
    """Give ``made`` the gamma and beta of the layer whose place it takes, the same objects, where it has such."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        own = made._parameters.get(name)
        if own is not None and (tensor is None or own.shape == tensor.shape):
            made.register_parameter(name, tensor)


def device_and_dtype(made: nn.Module, like: Tensor | None) -> nn.Module:
    """``made`` where ``like`` is."""
    return made if like is None else made.to(like.device, like.dtype if like.is_floating_point() else torch.float32)
