"""What is measured on a run's curve, and how it spreads over seeds. No torch: pages are rebuilt with these."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from batchnorm.study.document import Spread

Curve = Sequence[tuple[int, float]]
# Movement is given for so many steps: the way travelled from look to look, not the distance at the end.
PER = 100


def steps_to(curve: Curve, threshold: float, consecutive: int = 2) -> int | None:
    """The first step from which ``consecutive`` evaluations in a row are at ``threshold`` or above; None if never.

    ``curve`` is (step, accuracy) by step. One lucky evaluation does not count, hence two by default.
    """
    for place in range(len(curve) - consecutive + 1):
        if all(value >= threshold for _, value in curve[place : place + consecutive]):
            return curve[place][0]
    return None


def best(curve: Curve, consecutive: int = 2) -> float | None:
    """The highest accuracy that ``consecutive`` evaluations in a row reach, the partner of :func:`steps_to`."""
    windows = (curve[place : place + consecutive] for place in range(len(curve) - consecutive + 1))
    return max((min(value for _, value in window) for window in windows), default=None)


def spread(values: Sequence[float | None]) -> Spread:
    """Median and range over seeds. None stands for 'never' and is larger than every number.

    For an even count the median is the mean of the two in the middle, None where one of them is.
    """
    if not values:
        return Spread(None, None, None, ())
    ordered = sorted(math.inf if value is None else float(value) for value in values)
    median = statistics.median(ordered)
    low, high = ordered[0], ordered[-1]
    finite = [None if math.isinf(number) else number for number in (median, low, high)]
    return Spread(finite[0], finite[1], finite[2], tuple(values))


def ratios(above: Sequence[float | None], below: Sequence[float | None]) -> Spread:
    """``above / below`` seed by seed. A pair in which the upper never arrived is open (None).

    Raises:
        ValueError: the two are not of one length.
    """
    pairs = list(zip(above, below, strict=True))
    return spread([None if top is None or not bottom else top / bottom for top, bottom in pairs])
