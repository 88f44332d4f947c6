"""The transforms that treat each feature alone: ``y = (x - mean) / scale + offset``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.preprocessing import affine as affine  # the operator
from batchnorm.preprocessing.base import Normalizer
from batchnorm.preprocessing.folding import LinearMap
from batchnorm.preprocessing.inputs import Batch, refuse_infinite, refuse_overflow
from batchnorm.preprocessing.modules import ScalingModule
from batchnorm.preprocessing.sparse import SparseBatch


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
        if isinstance(batch, SparseBatch):
            return self._apply_sparse(batch, inverse, in_place), False
        same = batch.values.dtype == dtype
        if same:
            out = batch.values if in_place and batch.writable else torch.ops.batchnorm.result_like(batch.values)
        else:
            out = torch.empty_like(batch.values, dtype=dtype)
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

    def _apply_sparse(self, batch: SparseBatch, inverse: bool, in_place: bool) -> Tensor:
        """The transform of the values stored; zero must be mapped to zero."""
        mean, low, scale = (s.to(batch.values.device) for s in (self.mean, self.mean_low, self.scale))
        zero = (-mean - low) / scale + self.offset
        moved = (zero.nan_to_num() != 0).nonzero().flatten().tolist()
        if moved:
            raise InputError(
                f"Sparse data was passed, but 0 becomes {float(zero[moved[0]]):.4g} in feature {moved[0]}, which would "
                "fill in all zeros: pass X.toarray(), or use scikit-learn's MaxAbsScaler"
            )
        dtype = batch.float_dtype
        same = in_place and batch.writable and batch.values.dtype == dtype
        out = batch.values if same else torch.empty_like(batch.values, dtype=dtype)
        for block, _, columns in batch.stored():
            values = batch.values[block].to(torch.float64)
            if inverse:
                y = ((values - self.offset) * scale[columns] + low[columns]) + mean[columns]
            else:
                y = ((values - mean[columns]) - low[columns]) / scale[columns] + self.offset
            out[block] = y.clamp(*self.clip) if self.clip is not None and not inverse else y
        return out


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
        if in_place or isinstance(batch, SparseBatch):
            refuse_infinite(self, batch)  # before anything is written
        # A result in half precision may overflow, and that too must show before anything is written.
        direct = in_place and batch.values.dtype != torch.float16
        out, infinite = self._affine().apply(batch, inverse=inverse, in_place=direct)
        if infinite:
            refuse_infinite(self, batch)
        if in_place and not direct and batch.writable:
            refuse_overflow(batch, out)
            out = batch.values.copy_(out)
        return out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._sparse_refusal() is None
        return tags

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
