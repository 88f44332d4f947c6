"""The figures and tables of section ``batches``."""

from __future__ import annotations

from collections.abc import Mapping

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Series, Spread, Table
from batchnorm.study.measures import spread
from batchnorm.study.sections.batches import COMPARED, TITLES
from batchnorm.study.sections.batches_found import Found
from batchnorm.study.wording import Role, bars, listed, rounded, share, short, triple


def by_size(found: Found) -> Figure:
    """Accuracy over the size of the batch."""
    # Sizes are names: an axis of logarithms would label hardly one of them.
    series = [
        _line(TITLES[norm][0], {str(size): item for size, item in items.items()}, TITLES[norm][1])
        for norm, items in found.sizes.items()
    ]
    small, large = min(found.sizes["batch"]), max(found.sizes["batch"])
    told = listed(
        f"{TITLES[norm][0]} from {share(items[small].median)} to {share(items[large].median)}"
        for norm, items in found.sizes.items()
    )
    return Figure(
        "batches-size",
        "lines",
        "Accuracy, by the size of the batch",
        "samples in a batch",
        "test accuracy",
        tuple(series),
        "Median and range over seeds, after the same number of steps: to the right, a net has seen more samples.",
        f"Accuracy over the size of the batch, from {small} to {large} samples: {told}.",
        y_range=(0.0, 1.0),
    )


def by_class(config: StudyConfig, found: Found) -> Figure:
    """Accuracy after batches of one class."""
    series = [bars(TITLES[norm][0], ("one class",), (item,), TITLES[norm][1]) for norm, item in found.one_class.items()]
    told = listed(f"{TITLES[norm][0]} {share(item.median)}" for norm, item in found.one_class.items())
    return Figure(
        "batches-one-class",
        "bars",
        f"Trained on batches of {config.batch} samples of one class",
        "batches",
        "test accuracy",
        tuple(series),
        "Median and range over seeds. Guessing is right in a tenth of the cases.",
        f"A bar for each normalization: {told}.",
        y_range=(0.0, 1.0),
    )


def lagging(config: StudyConfig, found: Found) -> Figure:
    """Accuracy with running averages, and recalibrated, over steps."""
    series = []
    for momentum, looks in found.lag.items():
        before = {step: pair[0] for step, pair in looks.items()}
        series.append(_line(f"running averages, momentum {short(momentum)}", before, "batch"))
    # Momentum has no part in training: recalibrated, all are one net.
    recalibrated = {
        step: spread([value for looks in found.lag.values() if step in looks for value in looks[step][1].values])
        for step in config.batches.looks
        if any(step in looks for looks in found.lag.values())
    }
    series.append(_line("recalibrated, whatever the momentum", recalibrated, "control", dash=True))
    told = listed(f"{item.name} {share(item.y[0])} to {share(item.y[-1])}" for item in series)
    return Figure(
        "batches-lag",
        "lines",
        "Evaluated with running averages, and recalibrated",
        "step",
        "test accuracy",
        tuple(series),
        "Median and range over seeds. Momentum is the weight of the new value in the averages and has no part in "
        "training: all have the same weights, and recalibrated they are one net.",
        f"Accuracy from the first look to the last: {told}.",
        y_range=(0.0, 1.0),
    )


def accuracies(config: StudyConfig, found: Found) -> Table:
    """Every size and kind of batch."""
    wanted = config.batches
    rows: list[tuple[Cell, ...]] = []
    for size in found.sizes["batch"]:
        for norm in COMPARED:
            again = found.recalibrated.get(norm, {}).get(size)
            item = found.sizes[norm][size]
            rows.append((TITLES[norm][0], "shuffled", size, size * wanted.steps, *triple(item), _cell(again)))
    if found.ghost.values:
        name, seen = f"ghost batches of {wanted.ghost}", config.batch * wanted.steps
        rows.append((name, "shuffled", config.batch, seen, *triple(found.ghost), None))
    for norm, item in found.one_class.items():
        again, seen = found.one_class_recalibrated.get(norm), config.batch * wanted.class_steps
        rows.append((TITLES[norm][0], "of one class", config.batch, seen, *triple(item), _cell(again)))
    columns = ("Net", "Batches", "Size", "Samples seen", "Accuracy", "Low", "High", "Recalibrated")
    note = "Test accuracy, median and range over seeds; recalibrated is the median of the nets with BN's averages."
    return Table("What becomes of small and sorted batches?", columns, tuple(rows), note)


def recalibrations(found: Found) -> Table:
    """Every look at running averages."""
    rows = tuple(
        (momentum, step, *triple(before), *triple(recalibrated))
        for momentum, looks in found.lag.items()
        for step, (before, recalibrated) in looks.items()
    )
    ends = ("", ", low", ", high")
    columns = ("Momentum", "Step", *(f"Before{end}" for end in ends), *(f"After{end}" for end in ends))
    return Table("What does recalibration bring?", columns, rows, "Test accuracy, median and range over seeds.")


def _line(name: str, items: Mapping[int, Spread] | Mapping[str, Spread], role: Role, *, dash: bool = False) -> Series:
    return Series(
        name,
        tuple(items),
        tuple(rounded(item.median) for item in items.values()),
        tuple(rounded(item.low) for item in items.values()),
        tuple(rounded(item.high) for item in items.values()),
        role=role,
        dash=dash,
    )


def _cell(value: Spread | None) -> float | None:
    return None if value is None or not value.values else rounded(value.median)
