"""The verdict: what the seeds can show, and what they cannot. No torch.

Every variant is compared with the reference, seed by seed: the two have the same initial weights and batches there. See
:mod:`batchnorm.study.comparison.intervals` for the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from batchnorm.study.comparison import planning
from batchnorm.study.comparison.intervals import LEVEL, Interval, exponential, interval
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.comparison.words import told
from batchnorm.study.measures import best, steps_to
from batchnorm.study.records import Records

# Of the way from the reference's first validation to its best: the mark that steps are counted to.
MARK = 0.95
Kind = Literal["better", "worse", "no difference shown", "one seed", "diverged", "not finished"]


@dataclass(frozen=True)
class Judgement:
    """A variant against the reference.

    ``difference`` is the variant's test value less the reference's, in the metric's units. ``steps`` is the ratio of
    the reference's steps to the mark to the variant's (above 1: the variant needs fewer); None where a seed of either
    never got there: ``reached`` then says how many did. ``time`` is the same in seconds, by the ``cost`` of a step,
    that of the variant over that of the reference; ``memory`` is the ratio of memory.
    """

    variant: str
    reference: str
    kind: Kind
    difference: Interval | None
    steps: Interval | None
    reached: tuple[int, int]
    time: Interval | None
    cost: float | None
    memory: float | None
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a comparison says. ``text`` is the whole in a few sentences; ``test`` names the method."""

    reference: str
    metric: str
    seeds: tuple[int, ...]
    mark: float | None
    judgements: tuple[Judgement, ...]
    test: str
    text: str

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def judge(config: CompareConfig, records: Records) -> Verdict:
    """The verdict of the records so far."""
    measured = records.where(section="measure")
    own = {name: by_seed(measured, name) for name in config.variants}
    mark = mark_of(config, own[config.reference])
    judgements = tuple(
        _judgement(config, records, name, own[config.reference], own[name], mark) for name in config.variants[1:]
    )
    seeds = sorted(set().union(*(values.keys() for values in own.values())))
    count = len(config.variants) - 1
    guard = f", Bonferroni for {count} comparisons" if count > 1 else ""
    return Verdict(
        config.reference,
        config.metric,
        tuple(seeds),
        mark,
        judgements,
        f"paired differences over seeds, Student's t, {LEVEL:.0%} intervals{guard}",
        " ".join(item.text for item in judgements),
    )


def by_seed(measured: Records, variant: str) -> dict[int, Records]:
    """The records of a variant's measured runs."""
    own = measured.where(variant=variant)
    return {seed: own.where(seed=seed) for seed in sorted(own.distinct("seed"))}


def mark_of(config: CompareConfig, reference: Mapping[int, Records]) -> float | None:
    """The mark: 95% of the way that the reference's validation makes, from its first value to its best two in a row,
    averaged over seeds; None where it makes none."""
    sign = 1 if config.higher else -1
    ways = []
    for run in reference.values():
        curve = [(step, sign * value) for step, value in run.curve("validation") if value is not None]
        top = best(curve) if curve else None
        if top is not None:
            ways.append((curve[0][1], top))
    if not ways:
        return None
    first, top = fmean(way[0] for way in ways), fmean(way[1] for way in ways)
    return sign * (first + MARK * (top - first)) if top > first else None


def arrivals(config: CompareConfig, runs: Mapping[int, Records], mark: float | None) -> dict[int, int | None]:
    """By seed, the step from which two validations in a row are at the mark or better; None if never."""
    if mark is None:
        return {}
    sign = 1 if config.higher else -1
    found = {}
    for seed, run in runs.items():
        curve = [(step, sign * value) for step, value in run.curve("validation") if value is not None]
        found[seed] = steps_to(curve, sign * mark)
    return found


def tests(runs: Mapping[int, Records]) -> dict[int, float | None]:
    """By seed, the test value at the step of the best validation; None where the run diverged, before or after it."""
    return {seed: run.value("test") if run.value("diverged") is None else None for seed, run in runs.items()}


def step_seconds(records: Records, variant: str) -> float | None:
    """The median seconds of a step."""
    found: float | None = records.where(section="calibrate", variant=variant, what="step").value("seconds")
    return found


def memory(records: Records, variant: str) -> int | None:
    """Bytes of a step."""
    found: int | None = records.where(section="calibrate", variant=variant).value("memory")
    return found


def _judgement(
    config: CompareConfig,
    records: Records,
    name: str,
    reference: Mapping[int, Records],
    own: Mapping[int, Records],
    mark: float | None,
) -> Judgement:
    count = len(config.variants) - 1
    ours, theirs = tests(own), tests(reference)
    pairs = [seed for seed in ours if seed in theirs]
    whole = [
        (mine, other) for seed in pairs if (mine := ours[seed]) is not None and (other := theirs[seed]) is not None
    ]
    resolution = 1 / max(config.samples[-1], 1) if config.metric == "accuracy" else 0.0
    difference = interval([mine - other for mine, other in whole], count, resolution) if whole else None
    cost = _ratio(step_seconds(records, name), step_seconds(records, config.reference))
    steps, time, reached = None, None, (0, 0)
    if mark is not None and pairs:
        arrived_own, arrived_other = arrivals(config, own, mark), arrivals(config, reference, mark)
        arrived = [(arrived_other[seed], arrived_own[seed]) for seed in pairs]
        reached = (sum(b is not None for _, b in arrived), sum(a is not None for a, _ in arrived))
        # Arrival before the first step cannot be divided by: it counts as the first.
        logs = [math.log(max(a, 1) / max(b, 1)) for a, b in arrived if a is not None and b is not None]
        if len(logs) == len(arrived):
            steps = exponential(interval(logs, count))
            time = exponential(interval([value - math.log(cost) for value in logs], count)) if cost else None
    kind = _kind(config, difference, len(pairs), len(whole))
    found = Judgement(
        name,
        config.reference,
        kind,
        difference,
        steps,
        reached,
        time,
        cost,
        _ratio(memory(records, name), memory(records, config.reference)),
        "",
    )
    text = told(config, found, len(pairs), mark, planning.complete(config, records))
    return Judgement(**{**vars(found), "text": text})


def _kind(config: CompareConfig, difference: Interval | None, pairs: int, whole: int) -> Kind:
    if not pairs:
        return "not finished"
    if difference is None or whole < pairs:
        return "diverged"
    if difference.low is None or difference.high is None:
        return "one seed"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "better" if (difference.mean > 0) == config.higher else "worse"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
