"""Bring features to one scale: unit variance, or a given range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from batchnorm._errors import InputError, ShapeError
from batchnorm.moments.operator import compute, pieces
from batchnorm.preprocessing.base import Array, is_constant, samples_seen
from batchnorm.preprocessing.batch import Batch
from batchnorm.preprocessing.centering import MomentsNormalizer
from batchnorm.preprocessing.elementwise import Affine, ElementwiseNormalizer
from batchnorm.preprocessing.sparse import SparseBatch


class StandardScaler(MomentsNormalizer):
    """Standardize each feature: ``y = (x - mean) / sqrt(var)``, ``var`` the biased variance (ddof 0).

    Parameters: ``with_mean`` and ``with_std`` choose the parts, ``copy=False`` writes into the data where their memory
    allows, ``channel_axis=1`` takes data of shape (N, C, *) and one statistic per channel.

    Attributes, float64 of shape (features,) and as in scikit-learn: ``mean_``, ``var_`` (None where neither part is
    asked for), ``scale_`` (None without ``with_std``), ``n_samples_seen_``, ``n_features_in_``, ``feature_names_in_``.

    Sparse data are taken with ``with_mean=False`` and stay sparse, of the same format and dtype; centring would fill in
    their zeros and is refused. What is not stored counts as 0, in the mean and variance too.

    A feature that cannot be told from a constant has the scale 1, so that rounding errors are never amplified: its
    deviation is at most ``n eps |mean|``, the error bound of the computation (Chan, Golub, LeVeque 1983; ``n`` capped
    at 2^14, see ``base.is_constant``). A feature that is NaN throughout has NaN statistics, of which
    ``fit`` warns (RuntimeWarning).
    """

    mean_: Array | None
    var_: Array | None
    scale_: Array | None

    def __init__(
        self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True, channel_axis: int | None = None
    ) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std
        self.channel_axis = channel_axis

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Normalize ``X``, see ``MeanSubtractor``; ``copy`` overrides the parameter, as in scikit-learn."""
        return self._transform(X, inverse=False, copy=copy)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Undo ``transform``; ``copy`` overrides the parameter, as in scikit-learn."""
        return self._transform(X, inverse=True, copy=copy)

    def _sparse_refusal(self) -> str | None:
        if not self.with_mean:
            return None
        return "StandardScaler cannot center it without filling in its zeros: pass with_mean=False, which keeps them"

    def _scale(self) -> Tensor:
        return torch.where(is_constant(self._stats), 1.0, self._stats.std())

    def _publish(self) -> None:
        super()._publish()
        self.mean_ = self._mean().numpy() if self.with_mean or self.with_std else None
        self.var_ = self._stats.var().numpy() if self.with_std else None
        self.scale_ = self._scale().numpy() if self.with_std else None

    def _affine(self) -> Affine:
        zero, one = torch.zeros_like(self._stats.mean), torch.ones_like(self._stats.mean)
        mean, low = (self._mean(), self._stats.mean_low) if self.with_mean else (zero, zero)
        return Affine(mean, low, self._scale() if self.with_std else one)


@dataclass(frozen=True, eq=False)
class Extrema:
    """The number of values (or the sum of their weights), the smallest and the largest of each of C channels.

    float64 of shape (C,). Where nothing was counted they are +inf and -inf, which merge with everything.
    """

    count: Tensor
    low: Tensor
    high: Tensor

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.low.shape[0]

    @classmethod
    def from_batch(cls, batch: Batch, weights: Tensor | None) -> Self:
        """The extrema of the batch over all axes but that of the channels, without NaN; ``weights``: (N,)."""
        rows = torch.tensor(float(batch.num_rows), dtype=torch.float64) if weights is None else weights.sum()
        if isinstance(batch, SparseBatch):
            low, high = batch.extremes(weights)
            return cls(rows.to(low).expand_as(low), low, high)
        x, channel_axis = batch.values, batch.axis
        positions = x.numel() // max(1, x.shape[0] * x.shape[channel_axis])
        if weights is not None and not bool((weights > 0).all()):
            x = x[weights > 0]
        low = x.new_full((x.shape[channel_axis],), torch.inf, dtype=torch.float64)
        high = -low
        for part, _ in pieces(x, None, channel_axis):
            sums = compute(part, None, True)
            low, high = torch.minimum(low, sums.low), torch.maximum(high, sums.high)
        return cls((rows * positions).to(low).expand_as(low), low, high)

    def merge(self, other: Self) -> Self:
        """The extrema of both sets of values together. Raises ShapeError."""
        if other.num_features != self.num_features:
            raise ShapeError(f"cannot merge extrema of {other.num_features} features into {self.num_features}")
        return type(self)(
            self.count + other.count, torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        )

    def to_dict(self) -> dict[str, Tensor]:
        """The statistics as plain tensors by name."""
        return {"count": self.count.clone(), "low": self.low, "high": self.high}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read what :meth:`to_dict` gave."""
        if set(tensors) != {"count", "low", "high"}:
            raise InputError(f"Extrema need the tensors count, low and high, got {sorted(tensors)}")
        return cls(tensors["count"], tensors["low"], tensors["high"])


class MinMaxScaler(ElementwiseNormalizer):
    """Bring each feature to a range: ``y = (x - min) (b - a) / (max - min) + a`` with ``feature_range=(a, b)``.

    Parameters: ``feature_range``, (-1, 1) as inputs of a network like it (scikit-learn's default is (0, 1));
    ``clip=True`` holds new data in the range; ``copy=False`` writes into the data where their memory allows;
    ``channel_axis=1`` takes data of shape (N, C, *) and one statistic per channel.

    Attributes, float64 of shape (features,) and as in scikit-learn: ``data_min_``, ``data_max_``, ``data_range_``,
    ``scale_`` and ``min_`` (``y = x scale_ + min_``), ``n_samples_seen_`` (a number, NaN counted; the sum of the
    weights where there are any; other weights than zero do not matter), ``n_features_in_``, ``feature_names_in_``.

    Sparse data are taken with ``feature_range=(0, b)`` and stay sparse; ``transform`` refuses them where a feature's
    smallest value is not 0, for then its zeros would be filled in.

    A feature whose values are all within one rounding error (an ulp of float64) of one constant counts as constant: as
    in scikit-learn its range is taken for 1, and it comes out as ``a``. A feature that is NaN throughout has NaN
    statistics (``fit`` gives a RuntimeWarning).
    """

    _stats: Extrema
    data_min_: Array
    data_max_: Array
    data_range_: Array
    scale_: Array
    min_: Array
    n_samples_seen_: int | float

    def __init__(
        self,
        feature_range: tuple[float, float] = (-1, 1),
        *,
        copy: bool = True,
        clip: bool = False,
        channel_axis: int | None = None,
    ) -> None:
        self.feature_range = feature_range
        self.copy = copy
        self.clip = clip
        self.channel_axis = channel_axis

    def _check_parameters(self) -> None:
        super()._check_parameters()
        bounds: Any = self.feature_range
        if (
            not isinstance(bounds, (tuple, list))
            or len(bounds) != 2
            or not all(isinstance(b, Real) and float("-inf") < float(b) < float("inf") for b in bounds)
            or bounds[0] >= bounds[1]
        ):
            raise InputError(
                "Minimum of desired feature range must be smaller than maximum: "
                f"expected feature_range=(a, b) with a < b, got {bounds!r}"
            )

    def _sparse_refusal(self) -> str | None:
        if self.feature_range[0] == 0:
            return None
        return (
            "MinMaxScaler would fill in its zeros: use feature_range=(0, 1), which keeps those of features that are "
            "not negative, or scikit-learn's MaxAbsScaler"
        )

    def _statistics(self, batch: Batch, weights: Tensor | None) -> Extrema:
        stats = Extrema.from_batch(batch, weights)
        stats = Extrema(stats.count.cpu(), stats.low.cpu(), stats.high.cpu())
        seen = stats.low <= stats.high
        self._refuse_unusable(batch, stats.low[seen], stats.high[seen], (stats.high - stats.low)[seen])
        return stats

    def _seen(self) -> Tensor:
        return self._stats.low <= self._stats.high

    def _range(self) -> tuple[Tensor, Tensor]:
        """The minimum and the range, NaN where no value was seen."""
        seen = self._seen()
        low = torch.where(seen, self._stats.low, torch.nan)
        return low, torch.where(seen, self._stats.high - self._stats.low, torch.nan)

    def _publish(self) -> None:
        low, extent = self._range()
        affine = self._affine()
        self.n_samples_seen_ = samples_seen(self._stats.count)  # type: ignore[assignment]
        self.data_min_ = low.numpy()
        self.data_max_ = (torch.where(torch.isnan(low), low, self._stats.high)).numpy()
        self.data_range_ = extent.numpy()
        self.scale_ = affine.scale.reciprocal().numpy()
        self.min_ = (affine.offset - low / affine.scale).numpy()

    def _affine(self) -> Affine:
        low, extent = self._range()
        largest = torch.maximum(self._stats.low.abs(), self._stats.high.abs())
        constant = extent <= 2 * torch.finfo(torch.float64).eps * largest
        a, b = (float(bound) for bound in self.feature_range)
        scale = torch.where(constant, 1.0, extent) / (b - a)
        return Affine(low, torch.zeros_like(low), scale, offset=a, clip=(a, b) if self.clip else None)

    def _centre_and_spread(self) -> tuple[Tensor, Tensor]:
        low, extent = self._range()
        return low + extent / 2, extent / 2

    def _read_state(self, tensors: dict[str, Tensor]) -> None:
        self._stats = Extrema.from_dict(tensors)
        self._publish()
