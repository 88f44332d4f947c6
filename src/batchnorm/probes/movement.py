"""How far distributions move while a network learns. Plain arithmetic on recorded numbers: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from batchnorm._errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

Percentiles = Sequence[Sequence[float]]
"""Percentiles of each unit: ``units x levels``."""


def typical_unit(percentiles: Percentiles) -> tuple[float, ...]:
    """The percentiles of the median unit: for each level, the median over units.

    Args:
        percentiles: ``units x levels``.
    """
    return tuple(median(level) for level in zip(*percentiles, strict=True))


def movement(before: Percentiles, after: Percentiles, deviations: Sequence[float] | None = None) -> float:
    """How far the typical unit's distribution moved between two looks: the median over units of :func:`distances`.

    Args:
        before: ``units x levels``, at the first look.
        after: the same at the second.
        deviations: standard deviation of each unit at the first look; the result is in units of it, else absolute.

    Returns:
        The distance; infinite where the typical unit had no spread at all and moved.

    Raises:
        InputError: the two looks differ in units or levels.
    """
    return float(median(distances(before, after, deviations).tolist()))


def distances(before: Percentiles, after: Percentiles, deviations: Sequence[float] | None = None) -> Array:
    """How far the percentiles of each unit moved between two looks.

    For unit u with percentiles p_k the distance is ``mean_k |p_k(after) - p_k(before)|``, divided by the unit's
    standard deviation ``before`` where ``deviations`` are given (then in units of std, else in the units of the input).

    Args:
        before: ``units x levels``, at the first look.
        after: the same at the second.
        deviations: standard deviation of each unit at the first look.

    Returns:
        One float64 for each unit: 0 where it did not move, infinite where it moved and had no spread.

    Raises:
        InputError: the two looks differ in units or levels.
    """
    moved = _moved(before, after)
    return in_units(abs(moved).mean(axis=1), deviations)


def wasserstein(
    before: Percentiles, after: Percentiles, levels: Sequence[float], deviations: Sequence[float] | None = None
) -> Array:
    """The 1-Wasserstein distance of each unit's distributions at two looks, from their quantiles.

    ``W1(F, G) = integral_0^1 |F^-1(q) - G^-1(q)| dq``: the mean way that a value goes when one distribution is carried
    over into the other. Between two levels the difference of the quantiles is taken to run straight (the trapezoidal
    rule, cut in two where the difference changes its sign); beyond the outermost levels it is taken to stay what it is
    there, so that a shift by d is |d| whatever the levels are. What only the tails beyond them do is not seen.

    Args:
        before: quantiles, ``units x levels``, at the first look.
        after: the same at the second.
        levels: the quantiles' levels in per cent, rising.
        deviations: standard deviation of each unit at the first look; the result is in units of it, else absolute.

    Returns:
        One float64 for each unit: 0 where it did not move, infinite where it moved and had no spread.

    Raises:
        InputError: the looks differ in units or levels, or the levels do not rise from 0 to 100.
    """
    import numpy as np

    moved = _moved(before, after)
    at = np.asarray(levels, dtype=np.float64) / 100.0
    if at.shape != moved.shape[1:]:
        raise InputError(f"expected a level for each of {moved.shape[1]} quantiles, got {at.size}")
    if at.size == 0 or at[0] < 0.0 or at[-1] > 1.0 or (np.diff(at) <= 0.0).any():
        raise InputError(f"expected levels that rise from 0 to 100 per cent, got {list(levels)}")
    size = abs(moved)
    left, right = size[:, :-1], size[:, 1:]
    together = left + right
    crossing = moved[:, :-1] * moved[:, 1:] < 0.0
    # Two triangles where the difference goes through zero: their area over the width is (a^2 + b^2) / (2 (a + b)).
    triangles = (left**2 + right**2) / (2.0 * np.where(crossing, together, 1.0))
    heights = np.where(crossing, triangles, together / 2.0)
    area = heights @ np.diff(at) + size[:, 0] * at[0] + size[:, -1] * (1.0 - at[-1])
    return in_units(area, deviations)


def chance(quantiles: Percentiles, levels: Sequence[float], count: int) -> Array:
    """The 1-Wasserstein distance to expect between two samples of one distribution: movement that is none.

    ``E W1 = integral E|F_n - G_n| dx ~ 2 / sqrt(pi n) integral sqrt(F (1 - F)) dx`` for n independent values in each:
    the difference has the variance ``2 F (1 - F) / n``, and a half-normal its mean. Asymptotic, close from n = 20 on;
    values that hang together (neighbours in an image) make for more.

    Args:
        quantiles: ``units x levels``, of one look.
        levels: in per cent, rising.
        count: n, values in each sample.

    Returns:
        One float64 for each unit, in the units of the input.
    """
    import numpy as np

    at = np.asarray(levels, dtype=np.float64) / 100.0
    values = np.asarray(quantiles, dtype=np.float64)
    height = np.sqrt(at * (1.0 - at))
    with np.errstate(invalid="ignore"):
        area: Array = np.diff(values, axis=1) @ ((height[1:] + height[:-1]) / 2.0)
    return area * 2.0 / np.sqrt(np.pi * count)


def in_units(moved: Array, deviations: Sequence[float] | None) -> Array:
    """Distances, one for each unit, over the units' standard deviations: as they are where these are None."""
    import numpy as np

    if deviations is None:
        return moved
    if len(deviations) != len(moved):
        raise InputError(f"expected two looks at the same units, got {len(deviations)} deviations and {len(moved)}")
    scale: Any = np.asarray(deviations, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(moved == 0.0, 0.0, moved / scale)


def _moved(before: Percentiles, after: Percentiles) -> Array:
    import numpy as np

    if len(before) != len(after) or not len(before):
        raise InputError(f"expected two looks at the same units, got {len(before)} and {len(after)}: probe one layer")
    for first, second in zip(before, after, strict=True):
        if len(first) != len(second):
            raise InputError(f"expected the same percentiles at both looks, got {len(first)} and {len(second)}")
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
