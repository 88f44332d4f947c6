"""The transforms that treat each feature alone: ``y = (x - mean) / scale + offset``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.preprocessing import affine as affine  # the operator
from batchnorm.preprocessing.base import Normalizer
from batchnorm.preprocessing.folding import LinearMap
from batchnorm.preprocessing.inputs import Batch, refuse_infinite
from batchnorm.preprocessing.modules import ScalingModule


@dataclass(frozen=True)
class Affine:
    """``y = ((x - mean) - mean_low) / scale + offset``, optionally clipped; statistics (C,) in float64."""

    mean: Tensor
    mean_low: Tensor
    scale: Tensor
    offset: float = 0.0
    clip: tuple[float, float] | None = None

    def apply(self, batch: Batch, *, inverse: bool, in_place: bool) -> tuple[Tensor, bool]:
        """The transform in float64, rounded once to the dtype; and whether an infinite value was met.

        ``in_place``: where the memory allows.
        """
        dtype = batch.float_dtype
        same = batch.values.dtype == dtype
        out = batch.values if in_place and batch.writable and same else torch.empty_like(batch.values, dtype=dtype)
        statistics = tuple(s.to(out.device) for s in (self.mean, self.mean_low, self.scale))
        numbers = (self.offset, *(self.clip or (-torch.inf, torch.inf)), inverse)
        x, y = _three_axes(batch.values, batch.axis), _three_axes(out, batch.axis)
        if same and x is not None and y is not None:
            return out, bool(torch.ops.batchnorm.affine(x, *statistics, *numbers, y))
        infinite = False
        for block, values in batch.row_blocks():
            copied = torch.empty(values.shape, dtype=torch.float64, device=out.device).copy_(values)
            y = _three_axes(copied, batch.axis)
            infinite |= bool(torch.ops.batchnorm.affine(y, *statistics, *numbers, y))
            out[block] = copied
        return out, infinite


def _three_axes(x: Tensor, channel_axis: int) -> Tensor | None:
    """``x`` as (N, C) or (N, C, P) if that takes no copy."""
    try:
        return x if x.ndim == 2 else x.movedim(channel_axis, 1).view(x.shape[0], x.shape[channel_axis], -1)
    except RuntimeError:
        return None


class ElementwiseNormalizer(Normalizer):
    """Base of the estimators that are an :class:`Affine` map."""

    copy: bool

    def _affine(self) -> Affine:
        raise NotImplementedError

    def _centre_and_spread(self) -> tuple[Tensor, Tensor]:
        """Where the data lie and how far they vary, (C,) in float64."""
        raise NotImplementedError

    def _map(self, batch: Batch, inverse: bool, copy: bool | None) -> Tensor:
        in_place = not (self.copy if copy is None else copy)
        if in_place:
            refuse_infinite(self, batch)  # before anything is written
        out, infinite = self._affine().apply(batch, inverse=inverse, in_place=in_place)
        if infinite:
            refuse_infinite(self, batch)
        return out

    def to_module(self, dtype: torch.dtype = torch.float32, *, inverse: bool = False) -> ScalingModule:
        check_is_fitted(self)
        affine = self._affine()
        return ScalingModule(
            affine.mean,
            affine.mean_low,
            affine.scale,
            offset=affine.offset,
            clip=affine.clip,
            channel_axis=self.channel_axis,
            inverse=inverse,
            dtype=dtype,
        )

    def _linear_map(self) -> LinearMap:
        affine = self._affine()
        if affine.clip is not None:
            raise InputError("clipping is not linear: keep to_module() in front, or fit with clip=False")
        return LinearMap.of_features(
            affine.mean, affine.mean_low, affine.scale.reciprocal(), affine.offset, *self._centre_and_spread()
        )
