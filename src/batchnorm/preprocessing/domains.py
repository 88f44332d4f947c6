"""What CORAL knows of two domains, and the matrix that takes the covariance of one to that of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from batchnorm._errors import InputError, ShapeError
from batchnorm.moments import Scatter
from batchnorm.preprocessing.base import is_constant
from batchnorm.preprocessing.decomposition import default_tolerance
from batchnorm.preprocessing.shrinkage import FourthMoments, ledoit_wolf_intensity, shrink

Learned = Scatter | FourthMoments


@dataclass(frozen=True, eq=False)
class Domains:
    """What is known of two domains; None of one that nothing has been seen of."""

    source: Learned | None = None
    target: Learned | None = None

    @property
    def num_features(self) -> int:
        """The number of features."""
        return next(stats.num_features for stats in (self.source, self.target) if stats is not None)

    def merge(self, other: Self) -> Self:
        """The statistics of both, domain by domain."""
        return type(self)(_merged(self.source, other.source), _merged(self.target, other.target))

    def to_dict(self) -> dict[str, Tensor]:
        """The statistics as plain tensors, by the domain's name and their own."""
        domains = {"source": self.source, "target": self.target}
        return {
            f"{domain}.{name}": tensor
            for domain, stats in domains.items()
            if stats is not None
            for name, tensor in stats.to_dict().items()
        }

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Read what ``to_dict`` gave. Raises InputError where tensors are missing, superfluous or don't fit."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parts.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor
        if not parts or not set(parts) <= {"source", "target"}:
            raise InputError(f"expected the statistics of a source and a target, got those of {sorted(parts)}")
        stats = {
            domain: (FourthMoments if "fourth" in part else Scatter).from_dict(part) for domain, part in parts.items()
        }
        if len({part.num_features for part in stats.values()}) > 1:
            raise ShapeError("the statistics of source and target are of different width")
        return cls(**stats)


def _merged(a: Learned | None, b: Learned | None) -> Learned | None:
    if a is None or b is None:
        return b if a is None else a
    merged: Learned = a.merge(b)  # type: ignore[arg-type]
    return merged


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A domain's covariance, shrunk and regularized, by its eigenvectors (features, k): those that have variance."""

    variance: Tensor
    vectors: Tensor
    intensity: float

    @classmethod
    def of(
        cls, stats: Learned, *, shrinkage: str | float | None, regularization: float, tolerance: float | None
    ) -> Self:
        """Decompose the covariance of ``stats``."""
        scatter = stats.base if isinstance(stats, FourthMoments) else stats
        # The rounding errors of a constant feature must not pass for a direction of its own.
        varies = (~is_constant(scatter.moments())).to(torch.float64)
        matrix = scatter.cov() * torch.outer(varies, varies)
        intensity = 0.0 if shrinkage is None or isinstance(shrinkage, str) else shrinkage
        if isinstance(stats, FourthMoments):
            intensity = ledoit_wolf_intensity(stats, matrix, torch.ones_like(varies))
        variance, vectors = torch.linalg.eigh(shrink(matrix, intensity))
        variance = variance.clamp_min(0) + regularization
        if tolerance is None:
            tolerance = default_tolerance(scatter.num_features)
        kept = (variance > tolerance * variance[-1]) & (variance > 0)
        return cls(variance[kept], vectors[:, kept], intensity)

    def power(self, exponent: float) -> Tensor:
        """The symmetric power; 0 on directions without variance, whatever the sign of ``exponent``."""
        return (self.vectors * self.variance**exponent) @ self.vectors.T


@dataclass(frozen=True, eq=False)
class Alignment:
    """A solution, float64: ``matrix`` and ``inverse`` (features, features), ranks and intensities by domain."""

    matrix: Tensor
    inverse: Tensor
    ranks: tuple[int, int]
    intensities: tuple[float, float]
