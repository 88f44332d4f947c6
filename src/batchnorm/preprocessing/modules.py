"""Fitted transforms as modules that sit in front of a network, or undo the scaling of targets behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from batchnorm._errors import DtypeError, InputError, ShapeError

# Integers that a float32 cannot hold.
_WIDE_INTEGERS = (torch.int32, torch.int64, torch.uint32, torch.uint64)


class _FrontModule(nn.Module):
    """Statistics as buffers of float32 or wider; the result has the dtype of the input, ``dtype`` for integers.

    Half-precision input is computed in the buffers' precision, under autocast too. ``half()`` and ``to(dtype)`` of the
    network change ``dtype``, and leave the buffers' precision where it would narrow: a mean of 1e6 is none in float16.
    """

    mean_high: Tensor
    mean_low: Tensor

    def __init__(
        self, mean: Tensor, mean_low: Tensor, channel_axis: int | None, inverse: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        if not dtype.is_floating_point:
            raise DtypeError(f"expected a floating dtype for the module, got {dtype}")
        self.channel_axis = -1 if channel_axis is None else int(channel_axis)
        self.inverse = inverse
        self.dtype = dtype
        self._register("mean", mean, mean_low)

    def _register(self, name: str, value: Tensor, rest: Tensor | None = None) -> None:
        """``value + rest`` as the buffers ``name_high`` and ``name_low``."""
        high = self._narrowed(value)
        low = value - high.to(torch.float64)
        self.register_buffer(f"{name}_high", high)
        self.register_buffer(f"{name}_low", self._narrowed(low if rest is None else low + rest))

    def _narrowed(self, value: Tensor) -> Tensor:
        stored = torch.promote_types(self.dtype, torch.float32)
        narrowed = value.to(stored)
        if not torch.equal(torch.isfinite(narrowed), torch.isfinite(value)):
            largest = float(value.abs().nan_to_num(nan=0).max())
            raise InputError(f"a statistic of {largest:g} is outside {stored}: pass dtype=torch.float64")
        return narrowed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            known = before[name]
            if buffer is not None and known is not None and buffer.dtype.itemsize < known.dtype.itemsize:
                self._buffers[name] = known.to(buffer.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.mean_high.device)).dtype
        return self

    def _read(self, x: Tensor, width: int) -> Tensor:
        """``x`` as floating numbers that lose nothing, once its width is checked."""
        if not -x.ndim <= self.channel_axis < x.ndim or x.shape[self.channel_axis] != width:
            raise ShapeError(f"expected {width} features along axis {self.channel_axis}, got shape {tuple(x.shape)}")
        if x.is_complex():
            raise DtypeError(f"expected real numbers, got {x.dtype}")
        if x.is_floating_point():
            return x
        return x.to(torch.float64 if x.dtype in _WIDE_INTEGERS else self.mean_high.dtype)

    def _centred(self, x: Tensor) -> Tensor:
        # The high part is subtracted first: near the mean that is exact, and only then is the low part within reach.
        return (x - self._along(self.mean_high, x)) - self._along(self.mean_low, x)

    def _moved(self, x: Tensor) -> Tensor:
        return (x + self._along(self.mean_low, x)) + self._along(self.mean_high, x)

    def _along(self, statistic: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.channel_axis] = -1
        return statistic.view(shape)

    def _like(self, y: Tensor, x: Tensor) -> Tensor:
        return y.to(x.dtype if x.is_floating_point() else self.dtype)

    def extra_repr(self) -> str:
        return f"{self.mean_high.shape[0]}, channel_axis={self.channel_axis}" + ", inverse=True" * self.inverse


class ScalingModule(_FrontModule):
    """``y = (x - mean) / scale + offset``, feature by feature, clipped where the scaler clips.

    With ``inverse``: ``x = (y - offset) scale + mean``. Input and output (N, features), or (N, C, *) where the scaler
    has a ``channel_axis``. Training and evaluation are the same; NaN stays NaN. Raises ShapeError for another width,
    DtypeError for complex numbers.
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
        inverse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(mean, mean_low, channel_axis, inverse, dtype)
        self._register("factor", scale if inverse else scale.reciprocal())
        self.offset = offset
        self.clip = None if inverse else clip

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``."""
        y = self._read(x, self.mean_high.shape[0])
        high, low = self._along(self.factor_high, x), self._along(self.factor_low, x)
        if self.inverse:
            y = y.to(torch.promote_types(y.dtype, high.dtype)) - self.offset
            return self._like(self._moved(y * high + y * low), x)
        y = self._centred(y)
        y = y * high + y * low
        if self.offset:
            y = y + self.offset
        if self.clip is not None:
            y = y.clamp(*self.clip)
        return self._like(y, x)


class WhiteningModule(_FrontModule):
    """``y = W (x - mean)`` along the channels; with ``inverse`` ``x = D y + mean``.

    ``weight``: W (outputs, features), or D (features, outputs). Input (N, features), or (N, C, *) with a
    ``channel_axis``, along which the output has as many channels as ``weight`` has rows. Raises ShapeError for another
    width, DtypeError for complex numbers.
    """

    weight: Tensor

    def __init__(
        self,
        mean: Tensor,
        mean_low: Tensor,
        weight: Tensor,
        *,
        channel_axis: int | None = None,
        inverse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(mean, mean_low, channel_axis, inverse, dtype)
        self.register_buffer("weight", self._narrowed(weight))

    def forward(self, x: Tensor) -> Tensor:
        """Whiten ``x``."""
        y = self._read(x, self.weight.shape[1])
        y = y.to(torch.promote_types(y.dtype, self.weight.dtype))
        if not self.inverse:
            y = self._centred(y)
        with _full_precision(x):
            y = y.movedim(self.channel_axis, -1) @ self.weight.to(y.dtype).T
        y = y.movedim(-1, self.channel_axis)
        return self._like(self._moved(y) if self.inverse else y, x)


def _full_precision(x: Tensor) -> Any:
    """Out of autocast, which would round the factors of a product to half precision."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
