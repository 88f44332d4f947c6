"""Moments: what statistics know of each channel, and how two of them become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, overload

import torch
from torch import Tensor

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.moments.blocks import prepare, two_sum
from batchnorm.moments.operator import compute, pieces


@overload
def bessel_factor(count: float, ddof: float = 1) -> float: ...
@overload
def bessel_factor(count: Tensor, ddof: float = 1) -> Tensor: ...
def bessel_factor(count: float | Tensor, ddof: float = 1) -> float | Tensor:
    """Bessel's correction ``count / (count - ddof)``: what turns a biased variance into an unbiased one.

    The only place of the package that knows it. NaN where ``count <= ddof``: no unbiased variance exists there.
    """
    if isinstance(count, Tensor):
        return torch.where(count > ddof, count / (count - ddof), torch.nan)
    return count / (count - ddof) if count > ddof else float("nan")


def pooled(
    count: Tensor, mean: Tensor, m2: Tensor, products: Callable[[Tensor], Tensor] = torch.square
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and m2 of K sets together, from theirs, stacked in the first dimension: Chan's formulas for K at once

        n = sum n_k,    mean = sum n_k mean_k / n,    m2 = sum m2_k + n_k (mean_k - mean)^2

    The deviations are from the common mean, so that an error of it counts squared only. For means in one part;
    :meth:`Moments.merge` keeps two. Differentiable. Where nothing was counted all are 0. ``products`` is for sums of
    products between channels in the place of m2: what of (K, C) deviations is summed, as long as m2.
    """
    total = count.sum(0)
    share = count / torch.where(total > 0, total, 1)
    common = (share * mean).sum(0)
    return total, common, (m2 + count * products(mean - common)).sum(0)


class Mergeable:
    """What Moments and Scatter share: a mean in two parts, devices, dictionaries, and the formula of the merge."""

    count: Tensor
    mean: Tensor
    mean_low: Tensor

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.mean.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.mean.device

    def to(self, device: torch.device | str) -> Self:
        """The same statistics on another device."""
        return type(self)(**{name: value.to(device) for name, value in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """The statistics as plain tensors by name, for saving; :meth:`from_dict` reads them back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read what :meth:`to_dict` gave. Raises InputError where a tensor is missing or superfluous."""
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if set(tensors) != names:
            raise InputError(f"{cls.__name__} needs the tensors {sorted(names)}, got {sorted(tensors)}")
        return cls(**{name: tensor.to(torch.float64) for name, tensor in tensors.items()})

    def _merge_means(self, other: Self) -> tuple[Self, dict[str, Tensor], Tensor, Tensor]:
        """``other`` on this device, the merged count and mean, ``delta``, and ``n_a n_b / n``."""
        if type(other) is not type(self):
            raise DtypeError(f"expected {type(self).__name__} to merge, got {type(other).__name__}")
        if other.num_features != self.num_features:
            raise ShapeError(f"cannot merge statistics of {other.num_features} features into {self.num_features}")
        other = other.to(self.device)
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count, 0)
        delta = difference_of_means(other, self)
        high, low = two_sum(self.mean, delta * share)
        mean, mean_low = two_sum(high, low + self.mean_low)
        # From nothing, delta is other's whole mean in one part: take it over as it is instead.
        fresh = self.count == 0
        merged = {
            "count": count,
            "mean": torch.where(fresh, other.mean, mean),
            "mean_low": torch.where(fresh, other.mean_low, mean_low),
        }
        return other, merged, delta, self.count * share


def difference_of_means(a: Mergeable, b: Mergeable) -> Tensor:
    """``mean_a - mean_b`` rounded once, though each mean has two parts."""
    high, low = two_sum(a.mean, -b.mean)
    return high + (low + (a.mean_low - b.mean_low))


@dataclass(frozen=True, eq=False)
class Moments(Mergeable):
    """Count, mean and sum of squared deviations of each of C channels.

    ``count``, ``mean``, ``mean_low`` and ``m2`` are float64 tensors of shape (C,). ``count`` is the number of values or
    the sum of their weights. The mean is ``mean + mean_low``; ``mean`` alone is it rounded to float64. ``m2`` is the
    sum of squared deviations from it: not a variance, see :meth:`var`. Where nothing was counted all four are 0. A
    value that is infinite, or NaN without ``skip_nan``, makes the mean and m2 of its own channel NaN and of no other.
    Objects are not changed once made; merging gives a new one.
    """

    count: Tensor
    mean: Tensor
    mean_low: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str = "cpu") -> Self:
        """The statistics of nothing, which merge with everything."""
        return cls(*(torch.zeros(num_features, dtype=torch.float64, device=device) for _ in range(4)))

    @classmethod
    def from_batch(
        cls,
        x: Any,
        *,
        channel_axis: int | None = 1,
        weights: Any = None,
        mask: Any = None,
        skip_nan: bool = False,
    ) -> Self:
        """The moments of each channel of ``x`` over all its other axes, in float64 on the device of ``x``.

        ``x``: (N, C, *), a tensor or whatever NumPy reads, real, of any dtype; empty batches are fine.
        ``channel_axis``: the axis of the channels; None counts every value into one channel.
        ``weights``: not negative; (N,), or the shape of ``x`` without the channels, or broadcastable to that.
        ``mask``: boolean, of the same shapes; what is under False does not count, whatever it is (padding, NaN).
        ``skip_nan``: leave NaN out, so that channels have counts of their own.

        Gradients don't flow. Raises ShapeError, DtypeError (complex, text), InputError (negative weights).
        """
        return cls._of(*prepare(x, channel_axis, weights, mask), skip_nan=skip_nan)

    @classmethod
    def _of(cls, data: Tensor, weights: Tensor | None, axis: int, skip_nan: bool) -> Self:
        moments = cls.empty(data.shape[axis], data.device)
        with torch.no_grad():
            for part, part_weights in pieces(data, weights, axis):
                moments = moments.merge(cls(*compute(part, part_weights, skip_nan)[:4]))
        return moments

    def merge(self, other: Self) -> Self:
        """The moments of both sets of values together, on this one's device. Raises ShapeError, DtypeError."""
        other, merged, delta, balance = self._merge_means(other)
        return type(self)(**merged, m2=self.m2 + other.m2 + delta.square() * balance)

    def var(self, ddof: float = 0) -> Tensor:
        """``m2 / count``, (C,): the biased variance, or with ``ddof=1`` the unbiased one. NaN where undefined."""
        biased = self.m2 / self.count
        return biased * bessel_factor(self.count, ddof) if ddof else biased

    def std(self, ddof: float = 0) -> Tensor:
        """The square root of :meth:`var`."""
        return self.var(ddof).sqrt()
