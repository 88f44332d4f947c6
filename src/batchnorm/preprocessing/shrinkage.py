"""Ledoit-Wolf shrinkage, exact from statistics that merge.

The intensity needs the fourth moments ``sum_i d_ij^2 d_ik^2`` of deviations ``d`` from a mean that is only known at the
end. They are carried along with the third, ``sum_i d_ij^2 d_ik``, by which they can be moved to another mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.moments import Moments, Scatter, difference_of_means
from batchnorm.moments.blocks import prepare, sample_rows


@dataclass(frozen=True, eq=False)
class FourthMoments:
    """A :class:`Scatter` with ``third[j, k] = sum d_j^2 d_k`` and ``fourth[j, k] = sum d_j^2 d_k^2``, (C, C)."""

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

    @classmethod
    def from_batch(cls, x: Tensor, *, channel_axis: int, weights: Tensor | None, skip_nan: bool) -> Self:
        """The moments of the channel vectors of ``x``; arguments as for :meth:`Scatter.from_batch`."""
        base = Scatter.from_batch(x, channel_axis=channel_axis, weights=weights, skip_nan=skip_nan)
        third, fourth = torch.zeros_like(base.scatter), torch.zeros_like(base.scatter)
        data, w, axis = prepare(x, channel_axis, weights, None)
        for rows, row_weights in sample_rows(data, w, axis, skip_nan):
            deviation = (rows - base.mean) - base.mean_low
            squares = deviation.square()
            weighted = squares if row_weights is None else squares * row_weights.unsqueeze(1)
            third.addmm_(weighted.T, deviation)
            fourth.addmm_(weighted.T, squares)
        return cls(base, third, fourth)

    def merge(self, other: Self) -> Self:
        """The moments of both sets of vectors together."""
        base = self.base.merge(other.base)
        mine, theirs = self._about(base), other.to(base.device)._about(base)
        return type(self)(base, mine[0] + theirs[0], mine[1] + theirs[1])

    def to(self, device: torch.device | str) -> Self:
        """The same moments on another device."""
        return type(self)(self.base.to(device), self.third.to(device), self.fourth.to(device))

    def _about(self, base: Scatter) -> tuple[Tensor, Tensor]:
        """Third and fourth moments about the mean of ``base``: ``d`` becomes ``d + shift``, and ``sum d`` is 0."""
        shift = difference_of_means(self.base, base)
        square, scatter, variance = shift.square(), self.base.scatter, self.base.scatter.diagonal()
        third = self.third.addr(variance + self.base.count * square, shift)
        third.addcmul_(scatter, shift.unsqueeze(1), value=2)
        mixed = self.third * shift
        fourth = self.fourth.addcmul(scatter * shift, shift.unsqueeze(1), value=4)
        fourth.add_(mixed, alpha=2).add_(mixed.T, alpha=2)
        fourth.addr_(variance + self.base.count * square, square).addr_(square, variance)
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


def shrink(matrix: Tensor, intensity: float) -> Tensor:
    """``(1 - a) S + a (tr S / p) I``."""
    if intensity == 0:
        return matrix
    target = matrix.trace() / matrix.shape[0]
    return (1 - intensity) * matrix + intensity * target * torch.eye(matrix.shape[0]).to(matrix)


def ledoit_wolf_intensity(moments: FourthMoments, matrix: Tensor, scale: Tensor) -> float:
    """How far to shrink ``matrix``, the covariance of the data over ``scale``, towards a multiple of the identity.

    With ``mu = tr S / p``: the expected squared error of ``S`` over its squared distance from ``mu I``, at most 1
    (O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 88, 2004, lemmas 3.2 to 3.5).
    """
    inverse = scale.square().reciprocal()
    flat = matrix.flatten()
    return _intensity(
        n=float(moments.count),
        p=matrix.shape[0],
        trace=float(matrix.trace()),
        norm=float(flat @ flat),
        fourth=float(inverse @ moments.fourth @ inverse),
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
