"""What stands on top: the one number, its spread, and its limits right beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from batchnorm.report.numbers import number, plain, spread, steps
from batchnorm.study.document import Section, Summary

_SECTION = "headline"


@dataclass(frozen=True)
class Arm:
    """One side of the comparison; ``share`` is the length of its bar, in percent of the longer one."""

    label: str
    role: str
    steps: str
    spread: str
    lr: str
    share: float


@dataclass(frozen=True)
class Headline:
    """``ratio`` is e.g. "19.6", None where a median was never reached; ``each`` lists it by seed, in order of size.

    ``limits`` are the section's own words.
    """

    ratio: str | None
    spread: str
    each: tuple[str, ...]
    threshold: str
    seeds: str
    arms: tuple[Arm, ...]
    limits: tuple[str, ...]
    section: Section | None


def headline(summary: Summary) -> Headline | None:
    """The headline of ``summary``, None where that section did not run."""
    data = summary.speedup_90
    if data is None:
        return None
    ratio = data["ratio"]
    seeds = data["seeds"]
    count = len(seeds) if isinstance(seeds, list | tuple) else int(seeds)
    sides = (("without normalization", "none", "baseline"), ("with batch norm", "batch", "bn"))
    longest = max((data[f"{key}_steps"]["median"] or 0.0 for _, _, key in sides), default=0.0)
    arms = []
    for label, role, key in sides:
        side = data[f"{key}_steps"]
        # An arm that never arrives is drawn over the whole width: it took at least as long as anything here.
        share = 100.0 if side["median"] is None or not longest else 100 * side["median"] / longest
        arms.append(Arm(label, role, steps(side["median"]), spread(side), plain(data[f"{key}_lr"]), share))
    section = next((item for item in summary.sections if item.name == _SECTION), None)
    return Headline(
        ratio=None if ratio["median"] is None else number(ratio["median"]),
        spread=spread(ratio),
        each=tuple(
            "never" if value is None else number(value)
            for value in sorted(ratio["values"], key=lambda value: math.inf if value is None else value)
        ),
        threshold=f"{100 * data['threshold']:g}%",
        seeds=f"{count} seed" if count == 1 else f"{count} seeds",
        arms=tuple(arms),
        limits=section.does_not_show if section else (),
        section=section,
    )
