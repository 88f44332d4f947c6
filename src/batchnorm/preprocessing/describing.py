"""What a fitted estimator knows of the data, as plain numbers, and what in it is worth a second look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from batchnorm.moments import Moments
from batchnorm.preprocessing.base import Normalizer, is_constant
from batchnorm.preprocessing.domains import Domains
from batchnorm.preprocessing.findings import Finding, find
from batchnorm.preprocessing.scaling import Extrema, MinMaxScaler
from batchnorm.preprocessing.whitening import Whitener

_SHOWN = 5
# Up to this width the singular values of a triangular matrix take a second.
_SMALL = 2048


@dataclass(frozen=True)
class Spectrum:
    """Of a Whitener: what it kept of the directions of the data.

    ``variance`` (k,) of the data along each component, falling, and ``ratio`` its share of the total; both empty for
    "cholesky". ``rank``: the number of directions with variance; the others, ``without_variance``, are dropped by the
    rank tolerance. ``condition``: the largest variance over the smallest that was kept, None
    where it would take long. ``effective_rank``: the
    exponential of the entropy of the shares (Roy, Vetterli 2007): how many directions the variance is spread over.
    """

    variance: tuple[float, ...]
    ratio: tuple[float, ...]
    rank: int
    without_variance: int
    kept: int
    condition: float | None
    effective_rank: float | None
    shrinkage: float


@dataclass(frozen=True)
class Description:
    """A fitted estimator in plain numbers.

    ``columns``: statistics by name (``mean``, ``std``, ``min``, ``max``, ``count``, ``missing``), a value for each
    feature, None where there is none. ``missing`` is the share of values that are missing, beside the feature that has
    the most. ``constant`` and ``empty``: numbers of features that do not vary, and that never had a value.
    """

    estimator: str
    parameters: dict[str, Any]
    features: int
    names: tuple[str, ...] | None
    samples: float | None
    columns: dict[str, tuple[float | None, ...]]
    constant: tuple[int, ...]
    empty: tuple[int, ...]
    spectrum: Spectrum | None
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        """The estimator as it would be written, with its method and what is not its default."""
        inside = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        return f"{self.estimator}({inside})"

    @property
    def samples_text(self) -> str:
        """The number of samples, or the sum of their weights."""
        if self.samples is not None:
            return _number(self.samples)
        # Features without a value are listed by themselves.
        counts = sorted({count for count in self.columns.get("count", ()) if count})
        if len(counts) > 1:
            return f"{_number(counts[0])} to {_number(counts[-1])}, by feature"
        return _number(counts[0]) if counts else "none"

    def name(self, feature: int) -> str:
        """What a feature is called."""
        return str(feature) if self.names is None else self.names[feature]

    def named(self, kind: str) -> list[str | int]:
        """The ``constant`` or ``empty`` features, by name or number."""
        found: tuple[int, ...] = getattr(self, kind)
        return [number if self.names is None else self.names[number] for number in found]

    def listed(self, kind: str) -> str:
        """The same as a line of text, empty where there are none."""
        found = self.named(kind)
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return f"{len(found)}: {', '.join(map(str, found[:_SHOWN]))}{more}" if found else ""

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return dataclasses.asdict(self)


def describe(estimator: Normalizer) -> Description:
    """The statistics of a fitted estimator, and findings about them. Raises NotFittedError."""
    check_is_fitted(estimator)
    names = getattr(estimator, "feature_names_in_", None)
    columns, constant, empty = _columns(estimator)
    spectrum = _spectrum(estimator) if isinstance(estimator, Whitener) else None
    seen: Any = getattr(estimator, "n_samples_seen_", None)
    defaults = type(estimator)().get_params(deep=False)
    parameters = estimator.get_params(deep=False)
    made = Description(
        estimator=type(estimator).__name__,
        parameters={
            name: _plain(value) for name, value in parameters.items() if name == "method" or value != defaults[name]
        },
        features=estimator.n_features_in_,
        names=None if names is None else tuple(str(name) for name in names),
        samples=None if isinstance(seen, np.ndarray) or seen is None else float(seen),
        columns={name: _values(values) for name, values in columns.items()},
        constant=tuple(int(number) for number in np.flatnonzero(constant)),
        empty=tuple(int(number) for number in np.flatnonzero(empty)),
        spectrum=spectrum,
        findings=(),
    )
    dependent = _dependent(estimator, constant) if isinstance(estimator, Whitener) else []
    return dataclasses.replace(made, findings=find(made, dependent))


def _columns(estimator: Normalizer) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """Statistics by name, which features are constant, and which never had a value."""
    stats: Any = estimator._stats
    if isinstance(stats, Extrema):
        assert isinstance(estimator, MinMaxScaler)
        empty = (stats.low > stats.high).numpy()
        extent = (stats.high - stats.low).numpy()
        largest = torch.maximum(stats.low.abs(), stats.high.abs()).numpy()
        constant = ~empty & (extent <= 2 * np.finfo(np.float64).eps * largest)
        return {"min": estimator.data_min_, "max": estimator.data_max_}, constant, empty
    if isinstance(stats, Domains):
        return _domains(stats)
    moments: Moments = stats if isinstance(stats, Moments) else stats.moments
    count = moments.count.numpy()
    empty = count == 0
    columns = {"mean": np.where(empty, np.nan, moments.mean.numpy()), "std": moments.std().numpy()}
    if (count != count[0]).any():
        columns |= {"count": count, "missing": 1 - count / count.max()}
    return columns, ~empty & is_constant(moments).numpy(), empty


def _domains(stats: Domains) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """Of CORAL: the source's under the plain names, the target's beside them."""
    columns: dict[str, NDArray[Any]] = {}
    known = {"": stats.source, "target ": stats.target}
    for prefix, domain in known.items():
        if domain is not None:
            moments = domain.moments()
            columns |= {f"{prefix}mean": moments.mean.numpy(), f"{prefix}std": moments.std().numpy()}
    seen = stats.source or stats.target
    assert seen is not None, "a fitted CORAL has seen one of its domains"
    return columns, is_constant(seen.moments()).numpy(), np.zeros(stats.num_features, dtype=bool)


def _spectrum(estimator: Whitener) -> Spectrum:
    condition = None
    if estimator.method == "cholesky":
        variance = ratio = np.empty(0)
        if estimator.n_features_in_ <= _SMALL:
            factors = np.linalg.svd(estimator.whitening_, compute_uv=False)
            condition = _condition(factors[factors > 1e-12 * factors[0]] ** 2)
    else:
        variance, ratio = estimator.explained_variance_, estimator.explained_variance_ratio_
        condition = _condition(variance[variance > 0])
    return Spectrum(
        variance=tuple(map(float, variance)),
        ratio=tuple(map(float, ratio)),
        rank=estimator.rank_,
        without_variance=estimator.n_features_in_ - estimator.rank_,
        kept=estimator.n_components_,
        condition=condition,
        effective_rank=_effective_rank(variance),
        shrinkage=estimator.shrinkage_,
    )


def _condition(falling: NDArray[Any]) -> float | None:
    return float(falling[0] / falling[-1]) if len(falling) else None


def _effective_rank(variance: NDArray[Any]) -> float | None:
    positive = variance[variance > 0]
    if not len(positive):
        return None
    share = positive / positive.sum()
    return math.exp(float(-(share * np.log(share)).sum()))


def _dependent(estimator: Whitener, constant: NDArray[Any]) -> list[int]:
    """Features in directions without variance: linear combinations of others, the most involved first.

    The components are an orthonormal basis of the directions with variance: what a feature's axis lacks there, it has
    in those without.
    """
    if estimator.method == "cholesky" or not estimator.n_components_ == estimator.rank_ < estimator.n_features_in_:
        return []
    outside = 1 - np.square(estimator.components_).sum(axis=0)
    outside[constant] = 0
    order = np.argsort(-outside, kind="stable")
    return [int(number) for number in order if outside[number] > 1e-3]


def _values(values: Sequence[float] | NDArray[Any]) -> tuple[float | None, ...]:
    return tuple(float(value) if math.isfinite(value) else None for value in values)


def _number(count: float) -> str:
    # A sum of weights need not be whole.
    return f"{count:,.0f}" if count == int(count) else f"{count:,.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value
