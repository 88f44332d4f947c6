"""What the records of section ``batches`` come to, for its words and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Spread
from batchnorm.study.records import Records
from batchnorm.study.sections.batches import COMPARED, TITLES, after, comes_to

AVERAGING = ("batch", "renorm")


@dataclass(frozen=True)
class Found:
    """Accuracies over seeds.

    ``sizes`` and ``recalibrated`` are by normalization and size of the batch; ``one_class`` and
    ``one_class_recalibrated`` by normalization; ``lag`` by momentum and step: before recalibration and after it.
    """

    sizes: Mapping[str, Mapping[int, Spread]]
    recalibrated: Mapping[str, Mapping[int, Spread]]
    one_class: Mapping[str, Spread]
    one_class_recalibrated: Mapping[str, Spread]
    ghost: Spread
    lag: Mapping[float, Mapping[int, tuple[Spread, Spread]]]

    def gap(self, norm: str, size: int, against: str = "none") -> float:
        """By how much the accuracy with ``norm`` lies above that with another, at a size."""
        return middle(self.sizes[norm][size]) - middle(self.sizes[against][size])

    def gain(self, momentum: float, step: int) -> float:
        """What recalibration brings after a step."""
        before, recalibrated = self.lag[momentum][step]
        return middle(recalibrated) - middle(before)

    def greatest_gain(self) -> tuple[float, int]:
        """The momentum and step at which recalibration brings most."""
        looks = [(momentum, step) for momentum, steps in self.lag.items() for step in steps]
        return max(looks, key=lambda look: self.gain(*look))


def found_in(config: StudyConfig, records: Records) -> Found | None:
    """What the records hold, None while one of the three parts has nothing to compare."""
    wanted = config.batches
    by_size = {norm: records.where(case="size", variant=norm) for norm in TITLES}
    sizes = [size for size in wanted.sizes if all(by_size[norm].where(size=size).lines for norm in COMPARED)]
    one_class = {norm: records.where(case="one-class", variant=norm) for norm in COMPARED}
    lag: dict[float, dict[int, tuple[Spread, Spread]]] = {}
    for momentum in wanted.momenta:
        part = records.where(case="lag", momentum=momentum)
        pairs = {step: (after(part, step, "accuracy"), after(part, step, "recalibrated")) for step in wanted.looks}
        pairs = {step: pair for step, pair in pairs.items() if pair[0].values and pair[1].values}
        if pairs:
            lag[momentum] = pairs
    if not sizes or not lag or not all(part.lines for part in one_class.values()):
        return None
    return Found(
        {norm: {size: comes_to(by_size[norm].where(size=size)) for size in sizes} for norm in COMPARED},
        {
            norm: {size: after(by_size[norm].where(size=size), wanted.steps, "recalibrated") for size in sizes}
            for norm in AVERAGING
        },
        {norm: comes_to(part) for norm, part in one_class.items()},
        {norm: after(one_class[norm], wanted.class_steps, "recalibrated") for norm in AVERAGING},
        comes_to(by_size["ghost"]),
        lag,
    )


def middle(value: Spread) -> float:
    """The median, 0 where there is none."""
    return value.median if value.median is not None else 0.0
