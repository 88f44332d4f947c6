"""Scatter: the products between channels, of a batch or of a stream, and the covariance matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from batchnorm._errors import InputError, ShapeError
from batchnorm.moments.blocks import prepare, two_sum
from batchnorm.moments.operator import pieces
from batchnorm.moments.products import BLOCK_ELEMENTS, add_products, move_origin
from batchnorm.moments.statistics import Mergeable, Moments, bessel_factor

# Of a matrix that is turned over or symmetrized: the side of the parts that exist twice meanwhile.
_TURNED = 512


@dataclass(frozen=True, eq=False)
class Scatter(Mergeable):
    """Count, mean and scatter matrix ``sum_i (x_i - mean)(x_i - mean)^T`` of vectors with C channels.

    ``count`` is of shape (), ``mean`` and ``mean_low`` (see :class:`Moments`) of shape (C,), ``scatter`` of shape
    (C, C); all float64. A vector counts as a whole: one with a NaN in any channel spoils all products of that channel,
    as does an infinite value; with ``skip_nan`` a vector with a NaN is left out entirely, so that the matrix stays
    positive semidefinite. Objects are not changed once made; merging gives a new one (:class:`ScatterSum` is changed).
    """

    count: Tensor
    mean: Tensor
    mean_low: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str = "cpu") -> Self:
        """The statistics of nothing, which merge with everything."""
        shapes: tuple[tuple[int, ...], ...] = ((), (num_features,), (num_features,), (num_features, num_features))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def from_batch(
        cls,
        x: Any,
        *,
        channel_axis: int = 1,
        weights: Any = None,
        mask: Any = None,
        skip_nan: bool = False,
    ) -> Self:
        """The scatter of the channel vectors of ``x`` (N, C, *), each position of ``*`` a sample of its own.

        Arguments and errors are those of :meth:`Moments.from_batch`.
        """
        data, w, axis = prepare(x, channel_axis, weights, mask)
        added = ScatterSum(data.shape[axis], data.device)
        added._add(data, w, axis, skip_nan)
        return cls(**added.result(copy=False).to_dict())

    @classmethod
    def from_batches(cls, batches: Iterable[Any], *, channel_axis: int = 1, skip_nan: bool = False) -> Self:
        """The scatter of all batches together, in the memory of one.

        A batch is an array or tensor (N, C, *), or a pair of it and its weights, which may be None. Raises InputError
        where there are none, and what :meth:`from_batch` raises.
        """
        added: ScatterSum | None = None
        for batch in batches:
            x, weights = batch if isinstance(batch, tuple) else (batch, None)
            data, w, axis = prepare(x, channel_axis, weights, None)
            if added is None:
                added = ScatterSum(data.shape[axis], data.device)
            added._add(data, w, axis, skip_nan)
        if added is None:
            raise InputError("expected at least one batch, got none: pass Scatter.empty(C) on where there may be none")
        return cls(**added.result(copy=False).to_dict())

    def merge(self, other: Self) -> Self:
        """The scatter of both sets of vectors together, on this one's device. Raises ShapeError, DtypeError."""
        other, merged, delta, balance = self._merge_means(other)
        scaled = delta * balance.sqrt()  # the same on both sides: the matrix stays exactly symmetric
        return type(self)(**merged, scatter=(self.scatter + other.scatter).addr_(scaled, scaled))

    def cov(self, ddof: float = 0, *, out: Tensor | None = None) -> Tensor:
        """The covariance matrix (C, C), exactly symmetric: biased, or with ``ddof=1`` unbiased. NaN where undefined.

        ``out``: memory to write it to, float64 (C, C). That may be ``scatter`` itself, which uses this object up and
        needs no memory at all.
        """
        if out is None:
            out = self.scatter.clone()
        elif out is not self.scatter:
            out.copy_(self.scatter)
        _symmetrize(out)
        out /= self.count
        return out.mul_(bessel_factor(self.count, ddof)) if ddof else out

    def var(self, ddof: float = 0) -> Tensor:
        """The diagonal of :meth:`cov`."""
        return self.moments().var(ddof)

    def std(self, ddof: float = 0) -> Tensor:
        """The square root of :meth:`var`."""
        return self.var(ddof).sqrt()

    def moments(self) -> Moments:
        """Each channel's own moments."""
        return Moments(self.count.expand(self.num_features), self.mean, self.mean_low, self.scatter.diagonal())


class ScatterSum:
    """A :class:`Scatter` in the making: batches are added in place, in one (C, C) matrix however many there are.

    What is kept are sums of deviations from an origin near the mean, and of their products, see ``products``.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        shapes: tuple[tuple[int, ...], ...] = ((), (num_features,), (num_features,), (num_features, num_features))
        sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        self._count, self._origin, self._total, self._products = sums

    @classmethod
    def resume(cls, scatter: Scatter, *, copy: bool = True) -> Self:
        """Go on from ``scatter``. Without ``copy`` its matrix is taken over, and ``scatter`` must not be used again."""
        added = cls(0)
        added._count, added._origin = scatter.count.clone(), scatter.mean.clone()
        added._products = scatter.scatter.clone() if copy else scatter.scatter
        added._total = added._count * scatter.mean_low
        added._products.addr_(added._total, scatter.mean_low)
        return added

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self._origin.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._origin.device

    @property
    def count(self) -> Tensor:
        """How many vectors have been added, or the sum of their weights; a tensor of shape ()."""
        return self._count.clone()

    def moments(self) -> Moments:
        """Each channel's own moments so far; costs nothing beside :meth:`result`."""
        mean, mean_low, total = self._means()
        m2 = self._products.diagonal() - total * total / self._divisor()
        return Moments(self._count.expand(self.num_features).clone(), mean, mean_low, m2.clamp_min_(0))

    def add(
        self,
        x: Any,
        *,
        channel_axis: int = 1,
        weights: Any = None,
        mask: Any = None,
        skip_nan: bool = False,
    ) -> Self:
        """Add the channel vectors of ``x`` (N, C, *), whichever device they are on.

        Arguments and errors are those of :meth:`Scatter.from_batch`, and ShapeError for another C. After an error of
        the arguments nothing has been added.
        """
        self._add(*prepare(x, channel_axis, weights, mask), skip_nan=skip_nan)
        return self

    def _add(self, data: Tensor, weights: Tensor | None, axis: int, skip_nan: bool) -> None:
        self._check_width(data.shape[axis])
        sums = (self._count, self._origin, self._total, self._products)
        with torch.no_grad():
            for part, part_weights in pieces(data, weights, axis, limit=BLOCK_ELEMENTS):
                here = part.to(self.device), None if part_weights is None else part_weights.to(self.device)
                add_products(*here, skip_nan, *sums)

    def merge(self, other: Scatter) -> Self:
        """Add the vectors that ``other`` has seen; it stays as it was. Raises ShapeError for another C."""
        self._check_width(other.num_features)
        if float(other.count) == 0:
            return self
        other = other.to(self.device)
        # From the common mean both are as far as they have to be, and no further.
        shift = torch.where(self._count > 0, other.count / (self._count + other.count), 1)
        distance = (other.mean - self._origin) - self._total / self._divisor()
        to = self._origin + self._total / self._divisor() + distance * shift
        move_origin(self._count, self._origin, self._total, self._products, torch.where(torch.isfinite(to), to, 0))
        offset = (other.mean - self._origin) + other.mean_low
        self._products += other.scatter
        self._products.addr_(offset * other.count, offset)
        self._total += offset * other.count
        self._count += other.count
        return self

    def result(self, *, copy: bool = True) -> Scatter:
        """The statistics of all that has been added.

        Without ``copy`` the matrix goes to the result, so that there is only ever one, and this sum is empty again: it
        has a fresh matrix when something is added.
        """
        mean, mean_low, total = self._means()
        matrix = self._products.clone() if copy else self._products
        # The same vector twice: what is subtracted is exactly symmetric.
        scaled = total / self._divisor().sqrt()
        matrix.addr_(scaled, scaled, alpha=-1)
        diagonal = matrix.diagonal()
        diagonal.clamp_min_(0)
        _mirror(matrix)
        spoilt = ~torch.isfinite(total)
        if bool(spoilt.any()):
            matrix[spoilt] = torch.nan
            matrix[:, spoilt] = torch.nan
        result = Scatter(self._count.clone(), mean, mean_low, matrix)
        if not copy:
            self._count, self._origin, self._total = (torch.zeros_like(t) for t in (self._count, mean, mean))
            self._products = matrix.new_empty(0)
        return result

    def _divisor(self) -> Tensor:
        return torch.where(self._count > 0, self._count, 1)

    def _means(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean in two parts, and ``total`` with NaN for what is not finite."""
        total = torch.where(torch.isfinite(self._total), self._total, torch.nan)
        return *two_sum(self._origin, total / self._divisor()), total

    def _check_width(self, channels: int) -> None:
        if channels != self.num_features:
            raise ShapeError(f"cannot add data of {channels} features to statistics of {self.num_features}")
        if self._products.numel() != channels * channels:
            self._products = self._origin.new_zeros(channels, channels)


def _mirror(matrix: Tensor) -> None:
    """Overwrite what is above the diagonal with what is below, in place."""
    for first in range(0, matrix.shape[0], _TURNED):
        last = first + _TURNED
        block = matrix[first:last, first:last]
        block.copy_(block.tril() + block.tril(-1).T)
        matrix[first:last, last:] = matrix[last:, first:last].T


def _symmetrize(matrix: Tensor) -> None:
    """Replace a square matrix by the mean of itself and its transpose, in place."""
    for first in range(0, matrix.shape[0], _TURNED):
        last = first + _TURNED
        for other in range(first, matrix.shape[0], _TURNED):
            here, there = matrix[first:last, other : other + _TURNED], matrix[other : other + _TURNED, first:last]
            both = (here + there.T).div_(2)
            here.copy_(both)
            there.copy_(both.T)
