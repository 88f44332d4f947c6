"""Convolutions: the same question asked of a small convnet and of a deep one, in steps and in time.

Ioffe & Szegedy 2015, section 3.2: in a convolutional layer the mean and variance of a channel are taken over the batch
and all places, so that every place is normalized alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Spread, Table
from batchnorm.study.measures import Curve, best, ratios, spread, steps_to
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import Role, band, curves, listed, ranged, rounded, share, short, step_seconds, triple

THRESHOLD, FURTHER = 0.9, 0.95
# Ten classes: what is stuck at chance wanders a little around 10%.
STUCK = 0.25
TITLES: dict[str, tuple[str, Role]] = {"none": ("without", "none"), "batch": ("BN", "batch")}
# Seconds of a step, per convolution: of the shallow net, which is wider, and of the deep one.
COSTS = {"shallow": {"none": 0.0022, "batch": 0.0019}, "deep": {"none": 0.0013, "batch": 0.0009}}


@dataclass(frozen=True)
class Trained:
    """One net and rate over seeds: steps to 90% and to 95%, best accuracy, processor seconds of a step by seed."""

    lr: float
    near: Spread
    far: Spread
    tops: Spread
    seconds: Spread


def cases(config: StudyConfig) -> dict[str, dict[str, Any]]:
    """The two nets: width, convolutions per stage, and rates."""
    wanted = config.convnet
    return {
        "shallow": {"width": wanted.width, "depth": 1, "lrs": wanted.lrs},
        "deep": {"width": wanted.deep_width, "depth": wanted.deep_depth, "lrs": wanted.deep_lrs},
    }


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Both nets at each of their rates, without BN and with it."""
    steps = config.convnet.steps
    runs = []
    for seed in config.seed_list():
        for case, net in cases(config).items():
            for lr in net["lrs"]:
                for norm in TITLES:
                    # Looks at 300 images cost as much as a few steps: they are sparser than in the other sections.
                    params = {"lr": lr, "norm": norm, "width": net["width"], "depth": net["depth"], "until": FURTHER}
                    params |= {"batch": config.batch, "fine": 5, "fine_until": 100}
                    cost = steps * 2 * net["depth"] * COSTS[case][norm]
                    name = run_id("convnet", case, norm, lr=lr, seed=seed)
                    runs.append(Run(name, "convnet", norm, seed, steps, cost, params, {"case": case, "lr": lr}))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one convnet on digits, judged on the validation part: a rate is chosen by these figures."""
    from batchnorm.study import data, models
    from batchnorm.study.execution import tensors, train_net

    split = data.digits(run.seed)
    side = round(split.features**0.5)
    train, judged = ((x.view(-1, 1, side, side), y) for x, y in map(tensors, (split.train, split.validation)))
    names = ("norm", "width", "depth")
    model = models.convnet(1, split.classes, seed=run.seed, **{name: run.params[name] for name in names})
    return train_net(run, model, train, judged, report)


def trained(records: Records) -> Trained | None:
    """What the runs of one net, variant and rate came to."""
    lines = curves(records, "accuracy")
    if not lines:
        return None
    return Trained(
        records.lines[0]["lr"],
        spread([steps_to(line, THRESHOLD) for line in lines]),
        spread([steps_to(line, FURTHER) for line in lines]),
        spread([best(line) for line in lines]),
        step_seconds(records),
    )


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    tried: dict[str, dict[str, list[Trained]]] = {}
    for case, net in cases(config).items():
        found = {
            norm: [item for lr in net["lrs"] if (item := trained(records.where(case=case, variant=norm, lr=lr)))]
            for norm in TITLES
        }
        if all(found.values()):
            tried[case] = found
    if not tried:
        return None
    chosen = {case: {norm: min(items, key=_rank) for norm, items in found.items()} for case, found in tried.items()}
    return Section(
        name="convnet",
        title=SECTIONS["convnet"],
        question="Does a small convnet learn faster with batch normalization, in steps and in time?",
        headline=_headline(config, chosen),
        shows=tuple(_shows(config, tried, chosen)),
        does_not_show=tuple(_does_not_show(config, chosen)),
        setup=_setup(config),
        figures=tuple(_figures(config, records, chosen)),
        tables=(_table(config, tried),),
    )


def _rank(item: Trained) -> tuple[float, float]:
    return (float("inf") if item.near.median is None else item.near.median, -(item.tops.median or 0.0))


def _headline(config: StudyConfig, chosen: dict[str, dict[str, Trained]]) -> str:
    said = []
    for case, pair in chosen.items():
        name = f"a convnet of {_convolutions(config, case)} convolutions"
        plain, batch = pair["none"].near, pair["batch"].near
        ratio = ratios(plain.values, batch.values)
        if batch.median is None:
            said.append(f"{name} did NOT reach 90% with BN ({ranged(plain)} steps without)")
        elif ratio.median is None:
            said.append(
                f"{name} reaches 90% in {ranged(batch)} steps with BN and not within {config.convnet.steps} without it"
            )
        else:
            fewer = "times fewer steps" if ratio.median >= 1 else "times the steps, NOT fewer,"
            times = ratio.median if ratio.median >= 1 else 1 / ratio.median
            said.append(
                f"{name} reaches 90% in {short(times)} {fewer} with BN ({ranged(batch)} instead of {ranged(plain)})"
                + _in_time(pair)
            )
    text = "; ".join(said) + "."
    return text[0].upper() + text[1:]


def _after(config: StudyConfig, steps: Spread) -> str:
    return f"not within {config.convnet.steps} steps" if steps.median is None else f"after {ranged(steps)} steps"


def _in_time(pair: dict[str, Trained]) -> str:
    time = _time_ratio(pair)
    return "" if time.median is None else f", {short(time.median)} x in time"


def _time_ratio(pair: dict[str, Trained]) -> Spread:
    """Time to 90% without BN over time with it, seed by seed: steps times the processor time of a step."""
    times = {
        norm: [
            None if steps is None or seconds is None else steps * seconds
            for steps, seconds in zip(item.near.values, item.seconds.values, strict=True)
        ]
        for norm, item in pair.items()
    }
    return ratios(times["none"], times["batch"])


def _shows(
    config: StudyConfig, tried: dict[str, dict[str, list[Trained]]], chosen: dict[str, dict[str, Trained]]
) -> Iterator[str]:
    for case, pair in chosen.items():
        cost = ratios(pair["batch"].seconds.values, pair["none"].seconds.values)
        rates = f"{short(pair['none'].lr)} without BN, {short(pair['batch'].lr)} with it"
        yield (
            f"{_convolutions(config, case)} convolutions, best rate tried for each ({rates}): 95% "
            f"{_after(config, pair['none'].far)} without BN, {_after(config, pair['batch'].far)} with it; a step with "
            f"BN took {short(cost.median)} times as long (median processor time, one thread, our layer)."
        )
        stuck = [item.lr for item in tried[case]["none"] if item.tops.median is not None and item.tops.median < STUCK]
        works = [item.lr for item in tried[case]["batch"] if item.near.median is not None]
        if set(stuck) & set(works):
            yield (
                f"{_convolutions(config, case)} convolutions at the rate {listed(sorted(set(stuck) & set(works)))}: "
                "stuck near chance without BN, at 90% with it."
            )


def _does_not_show(config: StudyConfig, chosen: dict[str, dict[str, Trained]]) -> Iterator[str]:
    for case, pair in chosen.items():
        tops, time = pair["none"].tops.median, _time_ratio(pair).median
        if tops is not None and tops >= THRESHOLD:
            yield (
                f"That {_convolutions(config, case)} convolutions cannot be trained without BN: at its best rate the "
                f"plain net comes to {share(tops)} within {config.convnet.steps} steps."
            )
        if time is not None and time < 1.5:
            yield f"That {_convolutions(config, case)} convolutions gain much in time: {short(time)} x to 90%."
    yield (
        f"What comes after: runs end at {share(FURTHER)} or after {config.convnet.steps} steps, on 8 x 8 images, at "
        "few rates; who ends higher was not asked."
    )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.convnet
    layer = "3 x 3 convolution, BN or nothing, ReLU"
    return {
        "data": "scikit-learn digits as 1 x 8 x 8 images, pixels / 16; 1000 train, 300 validation, 497 test, per seed",
        "shallow net": f"{layer}, 2 x 2 pooling, twice: {wanted.width} and {2 * wanted.width} channels; average "
        "pooling, linear",
        "deep net": f"the same with {wanted.deep_depth} such layers before each pooling, {wanted.deep_width} and "
        f"{2 * wanted.deep_width} channels",
        "weights": "He normal, biases 0; the same for both variants of a seed",
        "training": f"plain SGD, batch {config.batch}, until {share(FURTHER)} or {wanted.steps} steps",
        "rates": f"shallow {listed(wanted.lrs)}, deep {listed(wanted.deep_lrs)}; the best for each variant is shown",
        "accuracy": "on the validation part, which nothing is trained on and by which the rate is chosen",
        "seeds": listed(config.seed_list()),
    }


def _figures(config: StudyConfig, records: Records, chosen: dict[str, dict[str, Trained]]) -> Iterator[Figure]:
    for case, pair in chosen.items():
        series = [
            band(
                f"{title}, rate {short(pair[norm].lr)}",
                _held(curves(records.where(case=case, variant=norm, lr=pair[norm].lr), "accuracy")),
                role,
            )
            for norm, (title, role) in TITLES.items()
        ]
        yield Figure(
            f"convnet-{case}",
            "lines",
            f"Validation accuracy of the convnet: {_convolutions(config, case)} convolutions",
            "step",
            "validation accuracy",
            tuple(series),
            f"Median and range over seeds, each variant at its best rate; runs end at {share(FURTHER)} and are "
            "drawn on at their last value.",
            "Accuracy over steps: the line of the net with batch normalization climbs first.",
            y_range=(0.0, 1.0),
        )


def _held(found: list[Curve]) -> list[Curve]:
    """Curves drawn on at their last value to the longest one's end: a band needs all seeds at a step."""
    steps = sorted({step for curve in found for step, _ in curve})
    return [
        tuple(
            (step, dict(curve).get(step, curve[-1][1])) for step in steps if step in dict(curve) or step > curve[-1][0]
        )
        for curve in found
    ]


def _table(config: StudyConfig, tried: dict[str, dict[str, list[Trained]]]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for case, found in tried.items():
        for norm, (title, _) in TITLES.items():
            for item in found[norm]:
                cells = (rounded(item.far.median), rounded(item.tops.median))
                rows.append((title, _convolutions(config, case), item.lr, *triple(item.near), *cells))
    columns = ("Net", "Convolutions", "Rate", "Steps to 90%", "Low", "High", "Steps to 95%", "Best accuracy")
    return Table("At each rate", columns, tuple(rows), "Median over seeds; an empty cell is 'never'.")


def _convolutions(config: StudyConfig, case: str) -> int:
    return 2 * int(cases(config)[case]["depth"])
