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
from batchnorm.preprocessing.memory import refuse_beyond_memory
from batchnorm.preprocessing.shrinkage import FourthMoments, ledoit_wolf_intensity, shrink
from batchnorm.preprocessing.spectrum import spectrum_of

Learned = Scatter | FourthMoments


def learn(x: Tensor, channel_axis: int, weights: Tensor | None, *, fourth: bool) -> Learned:
    """The products of the features of ``x``, without incomplete samples. Raises InputError beyond the memory."""
    width = x.shape[channel_axis]
    # Two domains' sums, and what solving takes beside; third and fourth moments.
    refuse_beyond_memory(
        (10 if fourth else 6) * 8 * width**2, f"alignment of {width} features", "reduce them first, by Whitener"
    )
    kind = FourthMoments if fourth else Scatter
    stats: Learned = kind.from_batch(x, channel_axis=channel_axis, weights=weights, skip_nan=True).to("cpu")
    return stats


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
class Roots:
    """The symmetric powers of a domain's covariance, shrunk and regularized, on the directions that have variance.

    ``variance`` (k,) and ``components`` (k, features) of those; ``intensity`` of the shrinkage.
    """

    variance: Tensor
    components: Tensor
    intensity: float

    @classmethod
    def of(
        cls,
        stats: Learned,
        *,
        shrinkage: str | float | None = None,
        regularization: float = 0.0,
        tolerance: float | None = None,
    ) -> Self:
        """Decompose the covariance of ``stats``."""
        scatter = stats.base if isinstance(stats, FourthMoments) else stats
        # The rounding errors of a constant feature must not pass for a direction of its own.
        varies = (~is_constant(scatter.moments())).to(torch.float64)
        matrix = scatter.cov().mul_(varies).mul_(varies.unsqueeze(1))
        intensity = 0.0 if shrinkage is None or isinstance(shrinkage, str) else shrinkage
        if isinstance(stats, FourthMoments) and shrinkage is not None:
            intensity = ledoit_wolf_intensity(stats, matrix, torch.ones_like(varies))
        spectrum = spectrum_of(shrink(matrix, intensity))
        variance = spectrum.variance + regularization
        if tolerance is None:
            tolerance = default_tolerance(scatter.num_features)
        kept = (variance > tolerance * variance[0]) & (variance > 0)
        return cls(variance[kept], spectrum.components[kept], intensity)

    def power(self, exponent: float) -> Tensor:
        """(features, features); 0 on directions without variance, whatever the sign of ``exponent``."""
        return self.components.T @ (self.components * (self.variance**exponent).unsqueeze(1))


@dataclass(frozen=True, eq=False)
class Alignment:
    """A solution, float64: ``matrix`` and ``inverse`` (features, features), ranks and intensities by domain."""

    matrix: Tensor
    inverse: Tensor
    ranks: tuple[int, int]
    intensities: tuple[float, float]

    @classmethod
    def of(cls, source: Roots, target: Roots) -> Self:
        """``C_t^(1/2) C_s^(-1/2)``, and back."""
        return cls(
            target.power(0.5) @ source.power(-0.5),
            source.power(0.5) @ target.power(-0.5),
            (source.variance.shape[0], target.variance.shape[0]),
            (source.intensity, target.intensity),
        )
