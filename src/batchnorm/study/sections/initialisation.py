"""Robustness to initialisation: the same net begun with weights of very different size, without BN and with it.

Ioffe & Szegedy 2015, section 3.3: BN makes a layer's output, and the gradient that it passes down, independent of the
scale of its weights, ``BN((a W) u) = BN(W u)``. A larger ``a`` thus only means smaller relative steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Series, Spread, Table
from batchnorm.study.measures import best, spread, steps_to
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import Role, curves, listed, ranged, rounded, share, short, triple

THRESHOLD = 0.9
# Runs end here, a little above the mark, so that what does not need its steps does not take them.
UNTIL = 0.95
TITLES: dict[str, tuple[str, Role]] = {"none": ("without", "none"), "batch": ("BN", "batch")}
# Seconds of a step and layer; what is at chance takes all its steps, with BN about a third.
COSTS = {"none": 0.00025, "batch": 0.0002}


@dataclass(frozen=True)
class Start:
    """What a net begun at one deviation comes to at its best rate: best accuracy and steps to 90%, over seeds."""

    lr: float
    tops: Spread
    steps: Spread

    @property
    def arrives(self) -> bool:
        """Whether most seeds get to 90%."""
        return self.steps.median is not None


Starts = dict[float, Start]


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Each depth, deviation and rate, without BN and with it."""
    wanted = config.initialisation
    return Plan(
        tuple(
            Run(
                run_id("initialisation", norm, layers=layers, std=std, lr=lr, seed=seed),
                "initialisation",
                norm,
                seed,
                wanted.steps,
                wanted.steps * layers * COSTS[norm],
                # Judged on the validation part: a rate is chosen by these figures, so the test part must not see them.
                {
                    "lr": lr,
                    "norm": norm,
                    "layers": layers,
                    "std": std,
                    "batch": config.batch,
                    "judge": "validation",
                    "until": UNTIL,
                },
                {"layers": layers, "std": std, "lr": lr},
            )
            for seed in config.seed_list("initialisation")
            for layers in wanted.layers
            for std in wanted.stds
            for lr in wanted.lrs
            for norm in TITLES
        )
    )


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits."""
    from batchnorm.study import data
    from batchnorm.study.execution import train_mlp

    lines, _ = train_mlp(run, data.digits(run.seed), report)
    return lines


def starts(config: StudyConfig, records: Records, layers: int, norm: str) -> Starts:
    """By deviation: the best rate's outcome. Fewest steps to 90% decide; where none gets there, the best accuracy."""
    found: Starts = {}
    for std in config.initialisation.stds:
        tried = []
        for lr in config.initialisation.lrs:
            lines = curves(records.where(layers=layers, variant=norm, std=std, lr=lr), "accuracy")
            if lines:
                steps = spread([steps_to(line, THRESHOLD) for line in lines])
                tried.append(Start(lr, spread([best(line) for line in lines]), steps))
        if tried:
            found[std] = min(tried, key=_rank)
    return found


def _rank(start: Start) -> tuple[float, float]:
    steps = start.steps.median
    return (float("inf") if steps is None else steps, -(start.tops.median or 0.0))


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    found = {
        layers: {norm: starts(config, records, layers, norm) for norm in TITLES}
        for layers in config.initialisation.layers
    }
    found = {layers: pair for layers, pair in found.items() if pair["none"] and pair["batch"]}
    if not found:
        return None
    return Section(
        name="initialisation",
        title=SECTIONS["initialisation"],
        question="How much does it matter how large the weights are at the start?",
        headline=_headline(config, found),
        shows=tuple(_shows(config, found)),
        does_not_show=tuple(_does_not_show(config, found)),
        setup=_setup(config),
        figures=(_figure(found),),
        tables=(_table(found),),
    )


def _headline(config: StudyConfig, found: dict[int, dict[str, Starts]]) -> str:
    layers = max(found)
    plain, batch = found[layers]["none"], found[layers]["batch"]
    wins = len(_arriving(batch)) > len(_arriving(plain))
    span = f"weights of deviation {short(min(batch))} to {short(max(batch))}"
    told = (
        f"{_count(plain)} without BN (best accuracy {_worst_to_best(plain)}), {_count(batch)} with it "
        f"({_worst_to_best(batch)})"
    )
    if wins:
        return f"Begun with {span}, a net of {layers} layers gets to 90% from {told}."
    return (
        f"BN did NOT widen the range of starts that work here: begun with {span}, a net of {layers} layers gets to 90% "
        f"within {config.initialisation.steps} steps from {told}."
    )


def _shows(config: StudyConfig, found: dict[int, dict[str, Starts]]) -> Iterator[str]:
    steps = config.initialisation.steps
    for layers, pair in found.items():
        yield (
            f"{layers} layers: without BN 90% within {steps} steps from {_which(pair['none'])}, with BN from "
            f"{_which(pair['batch'])}."
        )
        both = [std for std in pair["batch"] if std in pair["none"] and pair["none"][std].arrives]
        both = [std for std in both if pair["batch"][std].arrives]
        for std in both:
            plain, batch = pair["none"][std], pair["batch"][std]
            yield (
                f"{layers} layers begun at {short(std)}, where both get there: {ranged(plain.steps)} steps without BN, "
                f"{ranged(batch.steps)} with it."
            )


def _does_not_show(config: StudyConfig, found: dict[int, dict[str, Starts]]) -> Iterator[str]:
    good = {layers: _arriving(pair["none"]) for layers, pair in found.items()}
    good = {layers: stds for layers, stds in good.items() if stds}
    if good:
        told = listed(f"{listed(stds)} with {layers} layers" for layers, stds in good.items())
        yield f"That BN is needed where the start is good: the plain net gets there from a deviation of {told}."
    for layers, pair in found.items():
        failed = [std for std, start in pair["batch"].items() if not start.arrives]
        if failed:
            yield (
                f"That BN makes every start alike: with {layers} layers, {listed(failed)} did not get to 90% within "
                f"{config.initialisation.steps} steps."
            )
        slow = [start.steps.median for start in pair["batch"].values() if start.steps.median]
        if len(slow) > 1 and max(slow) > 2 * min(slow):
            yield (
                f"That the start stops mattering with BN: with {layers} layers it takes {short(min(slow))} to "
                f"{short(max(slow))} steps to 90%, depending on it."
            )
    rates = config.initialisation.lrs
    if len(rates) == 1:
        yield (
            f"What another rate would do: all nets were trained at the rate {short(rates[0])} for "
            f"{config.initialisation.steps} steps (--full tries several)."
        )
    else:
        yield f"More than {config.initialisation.steps} steps would: longer runs may get further at small rates."


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.initialisation
    rates = wanted.lrs
    chosen = f"rate {short(rates[0])}" if len(rates) == 1 else f"the best of the rates {listed(rates)} for each start"
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": f"64 - {listed(wanted.layers)} x 100 sigmoid - 10, all weights from N(0, std^2), biases 0",
        "std": listed(wanted.stds) + " (Xavier's is about 0.1)",
        "training": f"plain SGD, {chosen}, batch {config.batch}, until {share(UNTIL)} or {wanted.steps} steps",
        "accuracy": "on the validation part, which nothing is trained on; the best that two evaluations in a row hold",
        "seeds": listed(config.seed_list("initialisation")),
    }


def _figure(found: dict[int, dict[str, Starts]]) -> Figure:
    series = []
    for layers, pair in found.items():
        for norm, (title, role) in TITLES.items():
            items = pair[norm]
            low, high = (tuple(rounded(getattr(item.tops, end)) for item in items.values()) for end in ("low", "high"))
            series.append(
                Series(
                    f"{title}, {layers} layers",
                    tuple(items),
                    tuple(rounded(item.tops.median) for item in items.values()),
                    low,
                    high,
                    role=role,
                    dash=layers != min(found),
                )
            )
    return Figure(
        "initialisation-accuracy",
        "lines",
        "Best accuracy, by the size of the first weights",
        "standard deviation of the weights",
        "validation accuracy",
        tuple(series),
        f"Median and range over seeds; runs end at {share(UNTIL)}.",
        "Accuracy over the deviation of the first weights: the lines with batch normalization lie high over the whole "
        "range or most of it; those without stand out of chance only in a part of it.",
        log_x=True,
        y_range=(0.0, 1.0),
    )


def _table(found: dict[int, dict[str, Starts]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for layers, pair in found.items():
        for norm, (title, _) in TITLES.items():
            for std, start in pair[norm].items():
                tops = rounded(start.tops.median)
                rows.append((title, layers, std, start.lr, tops, *triple(start.steps), len(start.steps.values)))
    columns = ("Net", "Layers", "Std", "Rate", "Best accuracy", "Steps to 90%", "Low", "High", "Seeds")
    return Table("From where does it train?", columns, tuple(rows), "Median over seeds; an empty cell is 'never'.")


def _arriving(found: Starts) -> list[float]:
    return [std for std, start in found.items() if start.arrives]


def _count(found: Starts) -> str:
    return f"{len(_arriving(found))} of {len(found)} starts"


def _which(found: Starts) -> str:
    return f"{_count(found)} ({listed(_arriving(found))})" if _arriving(found) else "none of the starts"


def _worst_to_best(found: Starts) -> str:
    tops = [start.tops.median for start in found.values() if start.tops.median is not None]
    return f"{share(min(tops))} to {share(max(tops))}" if tops else "unknown"
