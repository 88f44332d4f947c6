"""Numbers as words and as lines of figures: how sections say what was measured. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from batchnorm.study.document import Series, Spread
from batchnorm.study.measures import Curve, spread
from batchnorm.study.records import Records

Role = Literal["none", "batch", "control", "other", "data-a", "data-b"]


def short(value: float | None) -> str:
    """A number with three significant digits, without an exponent where that is readable; None is "never"."""
    if value is None:
        return "never"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    # Whole numbers from 100 on: a step count of 654 must not become 6.54e+02.
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def ranged(value: Spread) -> str:
    """``median [low, high]``, or the median alone where the seeds agree."""
    if value.median is None:
        return "never"
    if value.low == value.high:
        return short(value.median)
    return f"{short(value.median)} [{short(value.low)}, {'open' if value.high is None else short(value.high)}]"


def share(value: float | None) -> str:
    """An accuracy as a percentage with one decimal: ``97.8%``."""
    return "unknown" if value is None else f"{100 * value:.1f}%"


def ranged_share(value: Spread) -> str:
    """Accuracies over seeds as percentages: ``97.8% [97.0%, 98.2%]``, or the median alone where the seeds agree."""
    if value.low == value.high:
        return share(value.median)
    return f"{share(value.median)} [{share(value.low)}, {share(value.high)}]"


def listed(items: Iterable[object]) -> str:
    """``a, b and c``; numbers in short form."""
    words = [short(item) if isinstance(item, int | float) else str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else "none"


def triple(value: Spread) -> tuple[float | None, float | None, float | None]:
    """Median, low and high as cells of a table."""
    return rounded(value.median), rounded(value.low), rounded(value.high)


def rounded(value: float | None) -> float | None:
    """Four significant digits: a table's cell, not a measurement's."""
    return None if value is None else float(f"{value:.4g}")


def curves(records: Records, metric: str) -> list[Curve]:
    """The curve of each run in ``records``, by seed."""
    runs = [records.where(run=run_id) for run_id in records.distinct("run")]
    runs.sort(key=lambda run: run.lines[0]["seed"])
    return [curve for run in runs if (curve := run.curve(metric))]


def step_seconds(records: Records) -> Spread:
    """What a step took in each run of ``records``, by seed."""
    timed = sorted(records.where(metric="seconds", what="step"), key=lambda line: line["seed"])
    return spread([line["value"] for line in timed])


def band(name: str, over_seeds: Sequence[Curve], role: Role, *, dash: bool = False) -> Series:
    """Median and range over seeds at the steps that all curves have."""
    tables = [dict(curve) for curve in over_seeds]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = [[table[step] for table in tables] for step in steps]
    return Series(
        name,
        tuple(steps),
        tuple(rounded(median(row)) for row in values),
        tuple(rounded(min(row)) for row in values),
        tuple(rounded(max(row)) for row in values),
        role=role,
        dash=dash,
    )


def bars(name: str, labels: Sequence[str], spreads: Sequence[Spread], role: Role) -> Series:
    """One bar with whiskers for each label; nothing is drawn where the median is open."""
    return Series(
        name,
        tuple(labels),
        tuple(rounded(item.median) for item in spreads),
        tuple(rounded(item.low) for item in spreads),
        tuple(rounded(item.high) for item in spreads),
        role=role,
    )
