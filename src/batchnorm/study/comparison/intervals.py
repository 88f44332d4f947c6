"""Intervals of means over seeds. No torch.

The interval of the mean difference d over n seeds is Student's (1908) for pairs,

    mean(d) +- t(1 - alpha / 2k, n - 1) * sd(d) / sqrt(n),

with Bonferroni's alpha / k for k comparisons, so that all k intervals hold together with probability 1 - alpha. The
ratio of steps gets the same on its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its interval (None for a single seed) and the values, one per seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def interval(values: Sequence[float], comparisons: int, resolution: float = 0.0) -> Interval:
    """Student's interval of the mean of ``values``, one of ``comparisons``.

    ``resolution`` is the smallest difference that could be seen at all (one test sample): values closer together than
    that do not make an interval of no width.
    """
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, tuple(values))
    from scipy.special import stdtrit

    spread = max(stdev(values), resolution / math.sqrt(12))
    quantile = float(stdtrit(len(values) - 1, 1 - (1 - LEVEL) / (2 * comparisons)))
    half = quantile * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, tuple(values))


def exponential(found: Interval) -> Interval:
    """The interval of a logarithm as that of the ratio."""
    low, high = (None if end is None else math.exp(max(min(end, 700.0), -700.0)) for end in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high, tuple(math.exp(item) for item in found.values))
