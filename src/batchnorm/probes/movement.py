"""How far distributions move while a network learns. Plain arithmetic on recorded numbers: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from batchnorm._errors import InputError

Percentiles = Sequence[Sequence[float]]
"""Percentiles of each unit: ``units x levels``."""


def typical_unit(percentiles: Percentiles) -> tuple[float, ...]:
    """The percentiles of the median unit: for each level, the median over units.

    Args:
        percentiles: ``units x levels``.
    """
    return tuple(median(level) for level in zip(*percentiles, strict=True))


def movement(before: Percentiles, after: Percentiles, deviations: Sequence[float] | None = None) -> float:
    """How far the typical unit's distribution moved between two looks.

    For unit u with percentiles p_k, the distance is ``mean_k |p_k(after) - p_k(before)|``, divided by the unit's
    standard deviation ``before`` where ``deviations`` are given (then in units of std, else in the units of the input);
    the result is its median over units.

    Args:
        before: ``units x levels``, at the first look.
        after: the same at the second.
        deviations: standard deviation of each unit at the first look.

    Returns:
        The distance; infinite where the typical unit had no spread at all and moved.

    Raises:
        InputError: the two looks differ in units or levels.
    """
    if len(before) != len(after) or (deviations is not None and len(deviations) != len(before)):
        raise InputError(f"expected two looks at the same units, got {len(before)} and {len(after)}: probe one layer")
    distances = []
    for place, (first, second) in enumerate(zip(before, after, strict=True)):
        if len(first) != len(second):
            raise InputError(f"expected the same percentiles at both looks, got {len(first)} and {len(second)}")
        distance = fmean(abs(b - a) for a, b in zip(first, second, strict=True))
        if deviations is None or distance == 0.0:
            distances.append(distance)
        else:
            distances.append(distance / deviations[place] if deviations[place] > 0.0 else float("inf"))
    return median(distances)
