"""Mean and sum of squared deviations in exact rational arithmetic, and a scatter matrix in extended precision."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


def exact_moments(
    values: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[Fraction, Fraction, Fraction]:
    """Count (or sum of weights), mean and m2 of ``values``, without rounding."""
    xs = [Fraction(float(v)) for v in values]
    ws = [Fraction(1)] * len(xs) if weights is None else [Fraction(float(w)) for w in weights]
    count = sum(ws, Fraction(0))
    if count == 0:
        return count, Fraction(0), Fraction(0)
    mean = sum((w * x for w, x in zip(ws, xs, strict=True)), Fraction(0)) / count
    return count, mean, sum((w * (x - mean) ** 2 for w, x in zip(ws, xs, strict=True)), Fraction(0))


def extended_scatter(rows: Any, weights: Any = None) -> tuple[Any, Any]:
    """Mean and scatter matrix of rows, in two passes of 80-bit floats, rounded to float64 at the end."""
    x = np.asarray(rows, dtype=np.longdouble)
    w = np.ones(len(x), dtype=np.longdouble) if weights is None else np.asarray(weights, dtype=np.longdouble)
    mean = (w[:, None] * x).sum(0) / w.sum()
    deviation = x - mean
    scatter = np.einsum("n,ni,nj->ij", w, deviation, deviation)
    return mean.astype(np.float64), scatter.astype(np.float64)


def assert_exact_scatter(scatter: Any, x: Any, weights: Any = None, tolerance: float = 1e-12) -> None:
    """The diagonal and the means against exact arithmetic, the rest against 80-bit floats."""
    for feature, column in enumerate(np.asarray(x, dtype=np.float64).T):
        count, mean, m2 = exact_moments(column, weights)
        got = Fraction(float(scatter.mean[feature])) + Fraction(float(scatter.mean_low[feature]))
        assert float(abs(Fraction(float(scatter.scatter[feature, feature])) - m2)) <= tolerance * float(m2)
        assert float(abs(got - mean)) <= tolerance * (float(m2 / count) ** 0.5 + 1e-6 * abs(float(mean)))
        assert float(abs(float(scatter.count) - count)) <= tolerance * float(count)
    means, expected = extended_scatter(x, weights)
    # What the rounding of 80-bit means alone makes of a single row, whose deviations are 0.
    spread = np.sqrt(np.diag(expected)) + 1e-12 * np.abs(means)
    bound = np.outer(spread, spread)
    assert (np.abs(scatter.scatter.numpy() - expected) <= tolerance * bound).all()
