"""The transforms that treat each feature alone: ``y = (x - mean) / scale + offset``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from batchnorm.preprocessing.base import Normalizer
from batchnorm.preprocessing.inputs import Batch
from batchnorm.preprocessing.modules import ScalingModule


@dataclass(frozen=True)
class Affine:
    """``y = ((x - mean) - mean_low) / scale + offset``, optionally clipped; statistics (C,) in float64."""

    mean: Tensor
    mean_low: Tensor
    scale: Tensor
    offset: float = 0.0
    clip: tuple[float, float] | None = None

    def apply(self, batch: Batch, *, inverse: bool, in_place: bool) -> Tensor:
        """The transform in float64, rounded once to the dtype; ``in_place`` where the memory allows."""
        dtype = batch.float_dtype
        in_place = in_place and batch.writable and batch.values.dtype == dtype
        out = batch.values if in_place else torch.empty_like(batch.values, dtype=dtype)
        mean, low, scale = (batch.along_channels(s) for s in (self.mean, self.mean_low, self.scale))
        for block, values in batch.row_blocks():
            y = torch.empty_like(values, dtype=torch.float64).copy_(values)
            if inverse:
                y.sub_(self.offset).mul_(scale).add_(low).add_(mean)
            else:
                y.sub_(mean).sub_(low).div_(scale).add_(self.offset)
                if self.clip is not None:
                    y.clamp_(*self.clip)
            out[block] = y
        return out


class ElementwiseNormalizer(Normalizer):
    """Base of the estimators that are an :class:`Affine` map."""

    copy: bool

    def _affine(self) -> Affine:
        raise NotImplementedError

    def _map(self, batch: Batch, inverse: bool, copy: bool | None) -> Tensor:
        return self._affine().apply(batch, inverse=inverse, in_place=not (self.copy if copy is None else copy))

    def to_module(self, dtype: torch.dtype = torch.float32) -> ScalingModule:
        check_is_fitted(self)
        affine = self._affine()
        return ScalingModule(
            affine.mean,
            affine.mean_low,
            affine.scale,
            offset=affine.offset,
            clip=affine.clip,
            channel_axis=self.channel_axis,
            dtype=dtype,
        )
