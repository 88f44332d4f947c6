"""What the records of the section ``outside`` say of each net, and that as figures and tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Series, Spread, Table
from batchnorm.study.measures import spread
from batchnorm.study.records import Records
from batchnorm.study.wording import Role, band, curves, rounded, short

TITLES: dict[str, tuple[str, Role]] = {
    "none": ("without normalization", "none"),
    "batch": ("BN", "batch"),
    "constants": ("statistics as constants", "control"),
    "whitening": ("whitening, constants", "data-a"),
    "whitening-interval": ("whitening at an interval, constants", "data-b"),
    "reprojected": ("re-expressed weights", "other"),
    "reprojected-bare": ("re-expressed weights, hardly damped", "other"),
}


@dataclass(frozen=True)
class Net:
    """One variant at one rate at its end, over seeds; ``kept`` by part, None where no step promised anything."""

    variant: str
    lr: float
    first: dict[str, Spread]
    last: dict[str, Spread]
    running: Spread
    kept: dict[str, Spread]

    @property
    def accuracy(self) -> float:
        """The median test accuracy with fresh statistics."""
        return self.last["fresh_accuracy"].median or 0.0

    @property
    def grew(self) -> str:
        """How many times as long the hidden weights are as at the start, in words."""
        before, after = self.first["weight_norm"].median, self.last["weight_norm"].median
        return f"{short(after / before)} x" if before and after else "no number"


Nets = dict[tuple[str, float], Net]


def nets(records: Records) -> Nets:
    found: Nets = {}
    for variant in TITLES:
        of_variant = records.where(variant=variant)
        for lr in of_variant.distinct("lr"):
            lines = of_variant.where(lr=lr)
            steps = lines.where(metric="train_loss").distinct("step")
            if not steps:
                continue
            at = {step: lines.where(step=step) for step in (min(steps), max(steps))}
            metrics = ("bias_norm", "weight_norm", "train_loss", "fresh_accuracy")
            first, last = (
                {metric: spread([line["value"] for line in at[end].where(metric=metric)]) for metric in metrics}
                for end in (min(steps), max(steps))
            )
            parts = lines.where(metric="kept").distinct("part")
            kept = {part: _kept(lines.where(metric="kept", part=part)) for part in parts}
            running = spread([curve[-1][1] for curve in curves(lines, "accuracy")])
            found[variant, lr] = Net(variant, lr, first, last, running, kept)
    return found


def _kept(lines: Records) -> Spread:
    """Per seed the median over looks at which a step promised anything, then the spread over seeds."""
    by_seed = [
        [line["value"] for line in lines.where(seed=seed) if line["value"] is not None]
        for seed in lines.distinct("seed")
    ]
    return spread([median(values) for values in by_seed if values])


def figures(config: StudyConfig, records: Records, found: Nets, rate: float) -> Iterator[Figure]:
    yield _toy_figure(config, records.where(variant="toy"))
    shown = [("constants", lr) for lr in sorted({lr for variant, lr in found if variant == "constants"})]
    shown += [(variant, rate) for variant in TITLES if variant != "constants" and (variant, rate) in found]
    texts = {
        "weight_norm": ("Length of the hidden weights", "length", "The weights of nets with constant statistics grow."),
        "train_loss": ("Training loss", "cross-entropy", "Some nets' loss rises and stays high; that of BN falls."),
        "fresh_accuracy": ("Test accuracy", "test accuracy", "Some nets stay at chance; BN climbs at once."),
    }
    for metric, (title, label, alt) in texts.items():
        series = []
        for variant, lr in shown:
            name, role = TITLES[variant]
            lines = curves(records.where(variant=variant, lr=lr), metric)
            if lines and all(value is not None for line in lines for _, value in line):
                dash = lr != rate or variant == "reprojected-bare"
                series.append(band(name if lr == rate else f"{name}, rate {short(lr)}", lines, role, dash=dash))
        yield Figure(
            f"outside-{metric.replace('_', '-')}",
            "lines",
            title,
            "step",
            label,
            tuple(series),
            f"Median and range over seeds, at rate {short(rate)} where no other is named.",
            alt,
            log_y=metric != "fresh_accuracy",
            y_range=(0.0, 1.0) if metric == "fresh_accuracy" else None,
        )
    yield _kept_figure(found, rate)


def _toy_figure(config: StudyConfig, toy: Records) -> Figure:
    series = []
    for layer, (_, role) in (("outside", TITLES["constants"]), ("batch", TITLES["batch"])):
        name = "the mean as a constant" if layer == "outside" else "through the mean (BN)"
        series.append(band(name, curves(toy.where(layer=layer), "toy_bias"), role))
    return Figure(
        "outside-toy",
        "lines",
        "A bias that learns alone",
        "step",
        "b",
        tuple(series),
        f"Median and range over seeds, at rate {short(config.outside.toy_lr)}. The loss of either does not move.",
        "A straight line that climbs from zero, with the mean as a constant; one that stays at zero, with BN.",
    )


def _kept_figure(found: Nets, rate: float) -> Figure:
    asked = [net for (_, lr), net in found.items() if lr == rate and net.kept]
    parts = tuple(dict.fromkeys(part for net in asked for part in net.kept))
    empty = Spread(None, None, None, ())
    series = []
    for net in asked:
        name, role = TITLES[net.variant]
        spreads = [net.kept.get(part, empty) for part in parts]
        middle, low, high = (
            tuple(rounded(getattr(item, end)) for item in spreads) for end in ("median", "low", "high")
        )
        series.append(Series(name, parts, middle, low, high, role=role, missing="none"))
    return Figure(
        "outside-kept",
        "bars",
        "What a step keeps of the loss decrease that it promises",
        "parameters that take the step",
        "kept / promised",
        tuple(series),
        f"At rate {short(rate)}: median over looks, then median and range over seeds. BN's gradient promises nothing "
        "of hidden biases.",
        "Bars of height one without normalization and with BN; with statistics as constants none for biases, and short "
        "ones for weights.",
    )


def table(found: Nets) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for (variant, lr), net in found.items():
        numbers = [
            net.last["bias_norm"].median,
            net.first["weight_norm"].median,
            net.last["weight_norm"].median,
            net.last["train_loss"].median,
            net.last["fresh_accuracy"].median,
            net.running.median,
        ]
        rows.append((TITLES[variant][0], lr, *(rounded(number) for number in numbers), len(net.running.values)))
    columns = (
        "Net",
        "Rate",
        "Biases",
        "Weights at first",
        "Weights",
        "Loss",
        "Accuracy",
        "By running averages",
        "Seeds",
    )
    return Table("At the end", columns, tuple(rows), "Median over seeds; lengths are of the hidden linear layers.")


def toy_table(toy: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for step in toy.where(metric="toy_bias").distinct("step"):
        cells: list[Cell] = [step]
        for layer in ("outside", "batch"):
            for metric in ("toy_bias", "toy_loss"):
                found = toy.where(step=step, layer=layer, metric=metric)
                cells.append(rounded(spread([line["value"] for line in found]).median))
        rows.append(tuple(cells))
    columns = ("Step", "b, constant mean", "Loss, constant mean", "b, BN", "Loss, BN")
    return Table("A bias that learns alone", columns, tuple(rows), "Median over seeds.")
