"""Ledoit-Wolf shrinkage, exact from statistics that merge.

The intensity for a covariance needs ``sum_i |d_i|^4`` of deviations ``d`` from a mean that is only known at the end. It
is carried along with ``sum_i |d_i|^2 d_i``, by which it can be moved to another mean. For a correlation features are
divided by deviations that are only known at the end, too: there it takes ``sum_i d_ij^2 d_ik^2`` of all pairs of
features, and ``sum_i d_ij^2 d_ik``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.moments import Moments, Scatter, difference_of_means
from batchnorm.moments.blocks import prepare, sample_rows


@dataclass(frozen=True, eq=False)
class FourthMoments:
    """A :class:`Scatter` with ``third = sum |d|^2 d`` (C,) and ``fourth = sum |d|^4`` ().

    Or of ``pairs``: ``third[j, k] = sum d_j^2 d_k`` and ``fourth[j, k] = sum d_j^2 d_k^2``, (C, C), whose sums over j,
    and over j and k, those are.
    """

    base: Scatter
    third: Tensor
    fourth: Tensor

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.base.num_features

    @property
    def count(self) -> Tensor:
        """The number of samples, or the sum of their weights."""
        return self.base.count

    @property
    def pairs(self) -> bool:
        """Whether every pair of features has a fourth moment of its own."""
        return self.fourth.ndim == 2

    @classmethod
    def from_batch(
        cls, x: Tensor, *, channel_axis: int, weights: Tensor | None, skip_nan: bool, pairs: bool = True
    ) -> Self:
        """The moments of the channel vectors of ``x``; arguments as for :meth:`Scatter.from_batch`."""
        base = Scatter.from_batch(x, channel_axis=channel_axis, weights=weights, skip_nan=skip_nan)
        third = torch.zeros_like(base.scatter if pairs else base.mean)
        fourth = torch.zeros_like(base.scatter if pairs else base.count)
        data, w, axis = prepare(x, channel_axis, weights, None)
        for rows, row_weights in sample_rows(data, w, axis, skip_nan):
            deviation = (rows - base.mean).sub_(base.mean_low)
            if pairs:
                squares = deviation.square()
                weighted = squares if row_weights is None else squares * row_weights.unsqueeze(1)
                third.addmm_(weighted.T, deviation)
                fourth.addmm_(weighted.T, squares)
            else:
                norms = torch.linalg.vecdot(deviation, deviation)
                weighted = norms if row_weights is None else norms * row_weights
                third.addmv_(deviation.T, weighted)
                fourth += weighted @ norms
        return cls(base, third, fourth)

    def merge(self, other: Self) -> Self:
        """The moments of both sets of vectors together; of ``pairs`` where both are."""
        base, other = self.base.merge(other.base), other.to(self.base.device)
        pairs = self.pairs and other.pairs
        mine, theirs = (each if pairs else each.summed() for each in (self, other))
        (third, fourth), (other_third, other_fourth) = mine._about(base), theirs._about(base)
        return type(self)(base, third.add_(other_third), fourth.add_(other_fourth))

    def summed(self) -> Self:
        """The same without pairs."""
        return type(self)(self.base, self.third.sum(0), self.fourth.sum()) if self.pairs else self

    def to(self, device: torch.device | str) -> Self:
        """The same moments on another device."""
        return type(self)(self.base.to(device), self.third.to(device), self.fourth.to(device))

    def _about(self, base: Scatter) -> tuple[Tensor, Tensor]:
        """Third and fourth moments about the mean of ``base``: ``d`` becomes ``d + shift``, and ``sum d`` is 0."""
        shift = difference_of_means(self.base, base)
        count, scatter, variance = self.base.count, self.base.scatter, self.base.scatter.diagonal()
        if not self.pairs:
            along, square, total = scatter @ shift, shift @ shift, variance.sum()
            third = self.third + 2 * along + (total + count * square) * shift
            fourth = self.fourth + 4 * (shift @ self.third + shift @ along) + square * (2 * total + count * square)
            return third, fourth
        square = shift.square()
        third = self.third.addr(variance + count * square, shift)
        third.addcmul_(scatter, shift.unsqueeze(1), value=2)
        mixed = self.third * shift
        fourth = self.fourth.addcmul(scatter * shift, shift.unsqueeze(1), value=4)
        fourth.add_(mixed, alpha=2).add_(mixed.T, alpha=2)
        fourth.addr_(variance + count * square, square).addr_(square, variance)
        return third, fourth

    def moments(self) -> Moments:
        """Each channel's own moments."""
        return self.base.moments()

    def to_dict(self) -> dict[str, Tensor]:
        """The moments as plain tensors by name."""
        return {**self.base.to_dict(), "third": self.third, "fourth": self.fourth}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read what :meth:`to_dict` gave."""
        rest = dict(tensors)
        try:
            third, fourth = rest.pop("third"), rest.pop("fourth")
        except KeyError as missing:
            raise InputError(f"FourthMoments need the tensor {missing}") from None
        return cls(Scatter.from_dict(rest), third, fourth)


def checked_shrinkage(shrinkage: Any) -> str | float | None:
    """The parameter of that name as it is computed with. Raises InputError for what it cannot be."""
    fixed = isinstance(shrinkage, Real) and not isinstance(shrinkage, bool) and 0 <= float(shrinkage) <= 1
    if not (shrinkage is None or fixed or (isinstance(shrinkage, str) and shrinkage == "ledoit-wolf")):
        raise InputError(f'shrinkage must be None, "ledoit-wolf" or a number in [0, 1], got {shrinkage!r}')
    return float(shrinkage) if fixed else shrinkage


def shrink(matrix: Tensor, intensity: float) -> Tensor:
    """``(1 - a) S + a (tr S / p) I``, in the memory of ``S``."""
    given = intensity * matrix.trace() / matrix.shape[0]
    matrix.mul_(1 - intensity).diagonal().add_(given)
    return matrix


def ledoit_wolf_intensity(moments: FourthMoments, matrix: Tensor, scale: Tensor) -> float:
    """How far to shrink ``matrix``, the covariance of the data over ``scale``, towards a multiple of the identity.

    With ``mu = tr S / p``: the expected squared error of ``S`` over its squared distance from ``mu I``, at most 1
    (O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88, 2004, lemmas 3.2 to 3.5).
    """
    if moments.pairs:
        inverse = scale.square().reciprocal()
        fourth = float(inverse @ moments.fourth @ inverse)
    elif bool((scale == 1).all()):
        fourth = float(moments.fourth)
    else:
        raise InputError("Ledoit-Wolf of a correlation needs statistics of its own from the first batch on: fit again")
    flat = matrix.flatten()
    return _intensity(
        n=float(moments.count),
        p=matrix.shape[0],
        trace=float(matrix.trace()),
        norm=float(flat @ flat),
        fourth=fourth,
    )


def ledoit_wolf_of_gram(gram: Tensor, weights: Tensor, num_features: int) -> float:
    """The same intensity from the Gram matrix ``sqrt(w_i w_k) d_i d_k / sum w`` of the samples, (n, n)."""
    n, flat = float(weights.sum()), gram.flatten()
    # w_i |d_i|^4 = (n G_ii)^2 / w_i
    fourth = float(((n * gram.diagonal()).square() / weights).sum())
    return _intensity(n=n, p=num_features, trace=float(gram.trace()), norm=float(flat @ flat), fourth=fourth)


def _intensity(*, n: float, p: int, trace: float, norm: float, fourth: float) -> float:
    """``trace`` and ``norm``, squared, of the covariance; ``fourth`` is the sum of ``|d_i|^4``."""
    mu = trace / p
    distance = norm / p - mu * mu
    error = (fourth / n - norm) / (n * p)
    if error <= 0 or distance <= 0:
        return 0.0
    return min(1.0, error / distance)
