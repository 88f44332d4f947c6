"""The loss around a net in words, tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Series, Spread, Table
from batchnorm.study.measures import spread
from batchnorm.study.records import Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.sections.landscape import Pair, pairs
from batchnorm.study.wording import Role, listed, rounded, share, short, triple

TITLES: dict[str, tuple[str, Role]] = {"none": ("without", "none"), "batch": ("BN", "batch")}
HALVES = ("first half", "second half")
Look = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A quantity of a look, None where it is no number; ``per_layer`` gives one for each layer asked."""

    name: str
    of: Callable[[Look], list[float | None]]
    per_layer: bool = False


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _width(look: Look) -> float | None:
    return None if look["most"] is None or look["least"] is None else look["most"] - look["least"]


def _relative_shifts(look: Look) -> list[float | None]:
    return [_ratio(shift, size) for shift, size in zip(look["shifts"], look["gradients"], strict=True)]


RANGE = Measure("loss range", lambda look: [_width(look)])
CHANGE = Measure("gradient change", lambda look: [look["change"]])
SMOOTH = Measure("beta of smoothness", lambda look: [look["smoothness"]])
SHIFT = Measure("covariate shift", lambda look: list(look["shifts"]), per_layer=True)
MEASURES = (
    RANGE,
    Measure("loss range / loss", lambda look: [_ratio(_width(look), look["loss"])]),
    CHANGE,
    Measure("gradient change / gradient", lambda look: [_ratio(look["change"], look["gradient"])]),
    SMOOTH,
    SHIFT,
    Measure("covariate shift / gradient", _relative_shifts, per_layer=True),
)
MAIN = (RANGE, CHANGE, SMOOTH, SHIFT)


@dataclass(frozen=True)
class Compared:
    """A measure in one half of a pair's runs: medians over looks, one for each seed (and layer), of both nets."""

    plain: Spread
    batch: Spread

    @property
    def ratios(self) -> Spread:
        """With BN / without, where both are numbers."""
        both = zip(self.plain.values, self.batch.values, strict=True)
        return spread([b / a for a, b in both if a and b is not None])

    @property
    def falls(self) -> int:
        """In how many it is less with BN."""
        both = zip(self.plain.values, self.batch.values, strict=True)
        # Infinite without BN, and a number with it, is less too.
        return sum(b is not None and (a is None or b < a) for a, b in both)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.plain.values)


Found = dict[tuple[str, str, str], Compared]
"""By the pair's case, the half and the measure's name."""


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while no pair has been seen whole."""
    seen = [pair for pair in pairs(config) if all(_runs(records, pair, norm) for norm in TITLES)]
    found = {
        (pair.case, half, measure.name): _compared(records, pair, half, measure)
        for pair in seen
        for half in HALVES
        for measure in MEASURES
    }
    if not any(item.count for item in found.values()):
        return None
    return Section(
        name="landscape",
        title=SECTIONS["landscape"],
        question="Is the loss smoother around a net with batch normalization?",
        headline=_headline(seen, found),
        shows=tuple(_shows(seen, found)),
        does_not_show=tuple(_does_not_show(config, records, seen, found)),
        setup=_setup(config),
        figures=tuple(_figures(records, seen, found)),
        tables=tuple(_table(seen, found, half) for half in HALVES),
    )


def _runs(records: Records, pair: Pair, norm: str) -> dict[int, Records]:
    """The looks of one kind of net, by seed."""
    lines = records.where(case=pair.case, variant=norm, metric="landscape")
    return {seed: lines.where(seed=seed) for seed in sorted(lines.distinct("seed"))}


def _compared(records: Records, pair: Pair, half: str, measure: Measure) -> Compared:
    plain, batch = (_runs(records, pair, norm) for norm in TITLES)
    values: tuple[list[float | None], list[float | None]] = ([], [])
    for seed in sorted(plain.keys() & batch.keys()):
        for found, runs in zip(values, (plain, batch), strict=True):
            late = half == HALVES[1]
            looks = [line["value"] for line in runs[seed] if (line["step"] > pair.steps / 2) == late]
            rows = [measure.of(look) for look in looks]
            # A net that has blown up has no numbers: spread counts them above all others.
            found += [spread(list(column)).median for column in zip(*rows, strict=True)]
    count = min(map(len, values))
    return Compared(*(spread(found[:count]) for found in values))


def _count(seen: list[Pair], found: Found, half: str, measure: Measure) -> tuple[int, int]:
    items = [found[pair.case, half, measure.name] for pair in seen]
    return sum(item.falls for item in items), sum(item.count for item in items)


def _headline(seen: list[Pair], found: Found) -> str:
    late = {measure: _count(seen, found, HALVES[1], measure) for measure in MAIN}
    told = {measure: f"{fall} of {count}" for measure, (fall, count) in late.items()}
    mixed = [measure for measure, (fall, count) in late.items() if fall < count]
    ratio = spread([value for pair in seen for value in found[pair.case, HALVES[1], RANGE.name].ratios.values])
    fall, count = late[RANGE]
    less = "less" if fall > count / 2 else "NOT less"
    text = (
        f"In the second half of training the loss varies {less} along the gradient with BN ({told[RANGE]} pairs of "
        f"nets, {short(ratio.median)} x as much), the gradient changes less in {told[CHANGE]}"
    )
    shift = f"the gradient form of covariate shift is less in {told[SHIFT]} layers"
    text += f", but {shift}" if SHIFT in mixed else f", and {shift}"
    early = []
    rising = [pair.title for pair in seen if _rises(found, pair, HALVES[0])]
    if rising:
        early.append(f"the loss varies MORE with BN for {listed(rising)}")
    fall, count = _count(seen, found, HALVES[0], SHIFT)
    if fall < count:
        early.append(f"covariate shift is less in only {fall} of {count}")
    return text + (f"; in the FIRST half {' and '.join(early)}." if early else ".")


def _rises(found: Found, pair: Pair, half: str) -> bool:
    """Whether the loss varies more with BN in most pairs."""
    item = found[pair.case, half, RANGE.name]
    return 2 * item.falls < item.count


def _shows(seen: list[Pair], found: Found) -> Iterator[str]:
    for pair in seen:
        parts = []
        for measure in MAIN:
            item = found[pair.case, HALVES[1], measure.name]
            parts.append(f"{measure.name} {short(item.ratios.median)} x ({item.falls} of {item.count} less)")
        yield f"{pair.title}, second half of the steps, with BN against without: {'; '.join(parts)}."


def _does_not_show(config: StudyConfig, records: Records, seen: list[Pair], found: Found) -> Iterator[str]:
    for half in HALVES:
        for pair in seen:
            items = {measure: found[pair.case, half, measure.name] for measure in MAIN}
            told = [
                f"the {measure.name} ({item.count - item.falls} of {item.count})"
                for measure, item in items.items()
                if item.falls < item.count
            ]
            if told:
                yield f"That it always falls: {pair.title}, {half}, not less with BN: {listed(told)}."
    if any(_rises(found, pair, HALVES[0]) for pair in seen):
        yield (
            "That a flat loss is a good one: a plain net that is stuck at chance lies on a plateau, where nothing "
            "varies and nothing is learned."
        )
    yield (
        "What the cause is: at one step a net with BN has the lower loss, and where the loss is low there is less of "
        "it to vary. The table has the ranges relative to the loss, and the changes relative to the gradient."
    )
    yield from _cost(config, records)


def _cost(config: StudyConfig, records: Records) -> Iterator[str]:
    seconds = {what: records.where(metric="seconds", what=what) for what in ("looks", "run")}
    of_run = {line["run"]: line["value"] for line in seconds["run"]}
    shares = [line["value"] / of_run[line["run"]] for line in seconds["looks"] if of_run.get(line["run"])]
    passes = [line["value"]["passes"] for line in records.where(metric="landscape")]
    if shares and passes:
        yield (
            f"That this is free: each look takes {passes[0]} passes where a step takes 2; here, at every "
            f"{config.landscape.every} steps, looks were {share(median(shares))} of the time of a run."
        )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.landscape
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "networks": listed(f"{pair.title}: rate {short(pair.lr)}, {pair.steps} steps" for pair in pairs(config)),
        "weights": "100 units a layer; Xavier normal for sigmoid, He normal for ReLU, biases 0",
        "training": f"plain SGD, batch {config.batch}",
        "looked at": f"every {wanted.every} steps, on a training batch of its own, in train mode "
        "(batchnorm.probes.landscape)",
        "loss range": "of steps of 1/2, 1, 2 and 4 learning rates along the gradient",
        "gradient change": "the largest change of the gradient over these steps (its predictiveness)",
        "beta of smoothness": "the largest change of the gradient for the way in the space of parameters",
        "covariate shift": "its gradient form: how much the gradient of a layer changes when those before take their "
        f"step; {wanted.shifts} layers a net",
        "numbers": "median over the looks of a half, for each seed",
        "seeds": listed(config.seed_list()),
    }


def _figures(records: Records, seen: list[Pair], found: Found) -> Iterator[Figure]:
    for pair in seen:
        series = []
        for norm, (title, role) in TITLES.items():
            runs = _runs(records, pair, norm)
            # One seed: the range is that of the loss along the gradient, not that over seeds.
            looks = [(line["step"], line["value"]) for line in next(iter(runs.values()))]
            looks = [(step, look) for step, look in looks if None not in (look["loss"], look["least"], look["most"])]
            lines = ((rounded(look[key]) for _, look in looks) for key in ("loss", "least", "most"))
            middle, low, high = (tuple(line) for line in lines)
            series.append(Series(title, tuple(step for step, _ in looks), middle, low, high, role=role))
        yield Figure(
            f"landscape-{pair.case}",
            "lines",
            f"Loss along the gradient: {pair.title}",
            "step",
            "cross-entropy",
            tuple(series),
            "The line is the loss of a batch, the band what it becomes 1/2 to 4 learning rates along the gradient, "
            f"on a logarithmic axis (seed {min(_runs(records, pair, 'none'))}).",
            f"The loss and its range along the gradient over the steps, {pair.title}, without BN and with it.",
            log_y=True,
        )
    series = []
    roles: tuple[Role, ...] = ("data-a", "data-b", "other")
    for pair, role in zip(seen, roles, strict=False):
        spreads = [found[pair.case, HALVES[1], measure.name].ratios for measure in MAIN]
        middle, low, high = (
            tuple(rounded(getattr(item, end)) for item in spreads) for end in ("median", "low", "high")
        )
        series.append(Series(pair.title, tuple(measure.name for measure in MAIN), middle, low, high, role=role))
    yield Figure(
        "landscape-ratios",
        "bars",
        "With BN, as a multiple of without",
        "measure",
        "with BN / without",
        tuple(series),
        "Second half of the steps: median and range over seeds, of covariate shift over seeds and layers. Below 1 is "
        "less.",
        "Bars for each measure and pair of nets: what BN makes of it, as a multiple of without.",
    )


def _table(seen: list[Pair], found: Found, half: str) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for pair in seen:
        for measure in MEASURES:
            item = found[pair.case, half, measure.name]
            cells = (rounded(item.plain.median), rounded(item.batch.median), *triple(item.ratios))
            rows.append((pair.title, measure.name, *cells, f"{item.falls} of {item.count}"))
    columns = ("Net", "Measure", "Without", "BN", "BN / without", "Low", "High", "Less in")
    return Table(f"Around the nets, {half} of the steps", columns, tuple(rows), "Medians; of shift, over layers too.")
