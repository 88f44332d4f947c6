"""Fitted transforms as modules that sit in front of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm._errors import ShapeError


def _parts(value: Tensor, dtype: torch.dtype, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``value + rest`` as a high and a low part in ``dtype``."""
    high = value.to(dtype)
    low = value - high.to(torch.float64)
    return high, (low if rest is None else low + rest).to(dtype)


class _FrontModule(nn.Module):
    """Centres along the channels: axis ``channel_axis``, or the last one where it is None."""

    mean_high: Tensor
    mean_low: Tensor

    def __init__(self, mean: Tensor, mean_low: Tensor, channel_axis: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.channel_axis = -1 if channel_axis is None else int(channel_axis)
        high, low = _parts(mean, dtype, mean_low)
        self.register_buffer("mean_high", high)
        self.register_buffer("mean_low", low)

    def _centred(self, x: Tensor) -> Tensor:
        width = self.mean_high.shape[0]
        if not -x.ndim <= self.channel_axis < x.ndim or x.shape[self.channel_axis] != width:
            raise ShapeError(f"expected {width} features along axis {self.channel_axis}, got shape {tuple(x.shape)}")
        # The high part is subtracted first: near the mean that is exact, and only then is the low part within reach.
        return (x - self._broadcast(self.mean_high, x)) - self._broadcast(self.mean_low, x)

    def _broadcast(self, statistic: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.channel_axis] = -1
        return statistic.view(shape)

    @staticmethod
    def _like(y: Tensor, x: Tensor) -> Tensor:
        return y.to(x.dtype) if x.is_floating_point() else y

    def extra_repr(self) -> str:
        return f"{self.mean_high.shape[0]}, channel_axis={self.channel_axis}"


class ScalingModule(_FrontModule):
    """``y = (x - mean) factor + offset``, feature by feature, clipped where the scaler clips.

    Input and output (N, features), or (N, C, *) where the scaler has a ``channel_axis``; the dtype is kept, and
    half-precision input is computed in the buffers' precision. Training and evaluation are the same. Raises ShapeError
    for another width.
    """

    factor_high: Tensor
    factor_low: Tensor

    def __init__(
        self,
        mean: Tensor,
        mean_low: Tensor,
        scale: Tensor,
        *,
        offset: float = 0.0,
        clip: tuple[float, float] | None = None,
        channel_axis: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(mean, mean_low, channel_axis, dtype)
        high, low = _parts(scale.reciprocal(), dtype)
        self.register_buffer("factor_high", high)
        self.register_buffer("factor_low", low)
        self.offset = offset
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``."""
        centred = self._centred(x)
        high, low = self._broadcast(self.factor_high, x), self._broadcast(self.factor_low, x)
        y = centred * high + centred * low
        if self.offset:
            y = y + self.offset
        if self.clip is not None:
            y = y.clamp(*self.clip)
        return self._like(y, x)


class WhiteningModule(_FrontModule):
    """``y = W (x - mean)`` along the channels.

    ``weight``: (outputs, features). Input (N, features), or (N, C, *) with a ``channel_axis``, along which the output
    has as many channels as ``weight`` has rows. Raises ShapeError for another width.
    """

    weight: Tensor

    def __init__(
        self,
        mean: Tensor,
        mean_low: Tensor,
        weight: Tensor,
        *,
        channel_axis: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(mean, mean_low, channel_axis, dtype)
        self.register_buffer("weight", weight.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten ``x``."""
        centred = self._centred(x).movedim(self.channel_axis, -1)
        y = centred @ self.weight.to(centred.dtype).T
        return self._like(y.movedim(-1, self.channel_axis), x)
