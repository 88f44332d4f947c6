"""Section ``deep`` in words, a table and a figure of depth: where each kind of net stops training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Series, Spread, Table
from batchnorm.study.measures import best, spread, steps_to
from batchnorm.study.records import Records
from batchnorm.study.wording import Role, curves, listed, ranged, rounded, short, triple

THRESHOLD = 0.9


@dataclass(frozen=True)
class Depths:
    """One kind of net at one rate: by number of layers, steps to 90% and best accuracy over seeds."""

    title: str
    role: Role
    lr: float
    steps: dict[int, Spread]
    tops: dict[int, Spread]

    @property
    def trained(self) -> list[int]:
        """The depths at which most seeds get to 90%."""
        return [layers for layers, steps in self.steps.items() if steps.median is not None]

    @property
    def failed(self) -> list[int]:
        """The depths at which they do not."""
        return [layers for layers, steps in self.steps.items() if steps.median is None]


def depths(config: StudyConfig, records: Records) -> list[Depths]:
    """What the runs of other depths came to, one entry for each kind of net and rate that has any."""
    wanted = config.deep
    kinds: list[tuple[str, Role, str, str, float, tuple[int, ...]]] = [
        ("without", "none", "depth", "none", wanted.plain_lr, wanted.plain_depths),
        ("without, larger start", "control", "wide-init", "none", wanted.wide_lr, wanted.wide_depths),
        *(("BN", "batch", "depth", "batch", lr, wanted.batch_depths) for lr in wanted.batch_lrs),
    ]
    found = []
    for title, role, case, norm, lr, layers in kinds:
        lines = {n: curves(records.where(case=case, variant=norm, lr=lr, layers=n), "accuracy") for n in layers}
        lines = {n: over_seeds for n, over_seeds in lines.items() if over_seeds}
        if lines:
            steps = {n: spread([steps_to(line, THRESHOLD) for line in over]) for n, over in lines.items()}
            tops = {n: spread([best(line) for line in over]) for n, over in lines.items()}
            found.append(Depths(title, role, lr, steps, tops))
    return found


def shows(config: StudyConfig, found: list[Depths]) -> Iterator[str]:
    """How deep each kind of net may be."""
    for kind in found:
        name = f"{_name(config, kind)} at the rate {short(kind.lr)}"
        if kind.trained and kind.failed:
            yield (
                f"{name}: {listed(_told(kind, kind.trained))} to 90%; {listed(kind.failed)} layers did not get there "
                f"within {config.deep.depth_steps} steps."
            )
        elif kind.trained:
            yield f"{name}: {listed(_told(kind, kind.trained))} to 90%; no depth that was tried failed."
        else:
            yield (
                f"{name}: no depth that was tried ({listed(kind.failed)} layers) got to 90% within "
                f"{config.deep.depth_steps} steps."
            )


def does_not_show(found: list[Depths]) -> Iterator[str]:
    """What depth costs with BN as well, and how far was tried."""
    for kind in found:
        if kind.role != "batch":
            continue
        medians = [steps for layers in kind.trained if (steps := kind.steps[layers].median)]
        if len(medians) > 1 and medians[-1] > 1.5 * medians[0]:
            yield (
                f"That depth costs nothing with BN: at the rate {short(kind.lr)}, {kind.trained[-1]} layers take "
                f"{short(medians[-1])} steps to 90% and {kind.trained[0]} layers {short(medians[0])}."
            )
    deepest = max((layers for kind in found for layers in kind.steps if kind.role == "batch"), default=None)
    if deepest is not None:
        yield f"What happens beyond {deepest} layers with BN, or on a task that gains by depth: digits do not."


def figures(found: list[Depths]) -> Iterator[Figure]:
    """Steps to 90% over the number of layers."""
    series = []
    for kind in found:
        steps = [kind.steps[layers] for layers in kind.trained]
        if steps:
            middle, low, high = zip(*(triple(item) for item in steps), strict=True)
            name = f"{kind.title}, rate {short(kind.lr)}"
            series.append(Series(name, tuple(kind.trained), middle, low, high, role=kind.role))
    if series:
        yield Figure(
            "deep-depth",
            "lines",
            "Steps to 90%, by depth",
            "layers of 100 sigmoids",
            "steps to 90%",
            tuple(series),
            "Median and range over seeds. A line ends with the last depth that was tried and got there.",
            "Steps to 90% over depth: the line with batch normalization lies lowest and goes furthest to the right.",
            log_y=True,
        )


def tables(found: list[Depths]) -> Iterator[Table]:
    """Every depth of every kind."""
    rows: list[tuple[Cell, ...]] = [
        (kind.title, layers, kind.lr, *triple(steps), rounded(kind.tops[layers].median), len(steps.values))
        for kind in found
        for layers, steps in kind.steps.items()
    ]
    if rows:
        columns = ("Net", "Layers", "Rate", "Steps to 90%", "Low", "High", "Best accuracy", "Seeds")
        yield Table("How deep?", columns, tuple(rows), "Median over seeds; an empty cell is 'never'. Runs end at 90%.")


def _told(kind: Depths, layers: list[int]) -> list[str]:
    return [f"{n} layers in {ranged(kind.steps[n])} steps" for n in layers]


def _name(config: StudyConfig, kind: Depths) -> str:
    names: dict[Role, str] = {
        "none": "Without BN",
        "control": f"Without BN, begun with weights {short(config.deep.wide_init)} x as large,",
        "batch": "With BN",
    }
    return names[kind.role]
