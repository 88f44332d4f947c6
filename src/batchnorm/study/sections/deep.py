"""A deep sigmoid net at Xavier's initialisation stays at chance, with BN it trains; what else trains it, and how deep.

Sigmoids pass on at most a quarter of a difference, so that without BN the signal shrinks from layer to layer. BN brings
it back to its size at each layer. What it says of depth is in ``deep_page``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Spread, Table
from batchnorm.study.measures import best, spread, steps_to
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import band, curves, listed, ranged, rounded, share, short, triple

THRESHOLD = 0.9
# Ten classes: 10% is chance, and a net that is stuck wanders a little around it.
STUCK = 0.25
# Seconds of a step and layer, and the share of its steps that a run takes which ends at its mark.
STEPS = {"none": 0.00024, "batch": 0.0004}
SHARES = {"none": 0.8, "batch": 0.15}


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """The plain net at each rate, with BN, and the plain net begun with larger weights; then other depths of each."""
    wanted = config.deep
    runs = []
    for seed in config.seed_list():
        runs += [_run(config, "plain", "none", seed, lr, wanted.steps, wanted.layers) for lr in wanted.lrs]
        runs.append(_run(config, "plain", "batch", seed, wanted.lr, wanted.batch_steps, wanted.layers))
        larger, steps = {"gain": wanted.wide_init, "until": THRESHOLD}, wanted.depth_steps
        runs += [
            _run(config, "wide-init", "none", seed, wanted.wide_lr, steps, layers, **larger)
            for layers in wanted.wide_depths
        ]
        runs += [
            _run(config, "depth", "none", seed, wanted.plain_lr, steps, layers, until=THRESHOLD)
            for layers in wanted.plain_depths
        ]
        runs += [
            _run(config, "depth", "batch", seed, lr, steps, layers, until=THRESHOLD)
            for layers in wanted.batch_depths
            for lr in wanted.batch_lrs
        ]
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits."""
    from batchnorm.study import data
    from batchnorm.study.execution import train_mlp

    lines, _ = train_mlp(run, data.digits(run.seed), report)
    return lines


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    batch = records.where(case="plain", variant="batch")
    stuck = {lr: _tops(records.where(case="plain", variant="none", lr=lr)) for lr in config.deep.lrs}
    stuck = {lr: tops for lr, tops in stuck.items() if tops.values}
    if not batch.lines or not stuck:
        return None
    from batchnorm.study.sections import deep_page

    arrived, depths = _steps(batch), deep_page.depths(config, records)
    return Section(
        name="deep",
        title=SECTIONS["deep"],
        question=f"Does a net of {config.deep.layers} sigmoid layers train without batch normalization?",
        headline=_headline(config, stuck, arrived),
        shows=(*_shows(config, stuck, batch), *deep_page.shows(config, depths)),
        does_not_show=(*_does_not_show(config, records), *deep_page.does_not_show(depths)),
        setup=_setup(config),
        figures=(_figure(config, records), *deep_page.figures(depths)),
        tables=(_table(config, records), *deep_page.tables(depths)),
    )


def _headline(config: StudyConfig, stuck: dict[float, Spread], arrived: Spread) -> str:
    layers, steps = config.deep.layers, config.deep.steps
    top = max(value for tops in stuck.values() for value in tops.values if value is not None)
    trains = [lr for lr, tops in stuck.items() if tops.high is not None and tops.high > STUCK]
    with_bn = (
        f"with BN it is at 90% after {ranged(arrived)} steps" if arrived.median else "with BN it missed 90% as well"
    )
    if not trains:
        return (
            f"{layers} x 100 sigmoid stays at chance (never above {share(top)}) at each of {len(stuck)} rates for "
            f"{steps} steps without BN; {with_bn}."
        )
    return (
        f"{layers} x 100 sigmoid did train without BN at the rate {listed(trains)} here (best {share(top)} within "
        f"{steps} steps); {with_bn}."
    )


def _shows(config: StudyConfig, stuck: dict[float, Spread], batch: Records) -> Iterator[str]:
    held = [lr for lr, tops in stuck.items() if tops.high is not None and tops.high <= STUCK]
    if held:
        yield (
            f"Without BN, the rates {listed(held)} all leave it where guessing is: the signal shrinks from layer to "
            "layer until the output hardly depends on the input."
        )
    yield (
        f"With BN at the rate {short(config.deep.lr)} the best test accuracy within {config.deep.batch_steps} steps is "
        f"{share(_tops(batch).median)} (median of {len(_tops(batch).values)} seeds)."
    )


def _does_not_show(config: StudyConfig, records: Records) -> Iterator[str]:
    wide = {layers: _steps(records.where(case="wide-init", layers=layers)) for layers in config.deep.wide_depths}
    wide = {layers: steps for layers, steps in wide.items() if steps.values}
    trained = [
        f"{layers} layers in {ranged(steps)} steps" for layers, steps in wide.items() if steps.median is not None
    ]
    failed = [f"{layers} layers" for layers, steps in wide.items() if steps.median is None]
    begun = f"begun with weights {short(config.deep.wide_init)} x as large"
    if trained:
        yield f"That BN is the only way: {begun}, the plain net gets to 90% too, {listed(trained)}."
    if failed:
        yield f"That larger weights always replace BN: {begun}, {listed(failed)} did not get to 90%."
    yield (
        f"That the plain net would never leave chance: it was watched for {config.deep.steps} steps at "
        f"{len(config.deep.lrs)} rates."
    )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.deep
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": f"64 - {wanted.layers} x 100 sigmoid - 10, Xavier normal weights, biases 0",
        "rates without BN": listed(wanted.lrs),
        "rate with BN": short(wanted.lr),
        "larger start": f"Xavier normal x {short(wanted.wide_init)}, rate {short(wanted.wide_lr)}",
        "training": f"plain SGD, batch {config.batch}, {wanted.steps} steps ({wanted.batch_steps} with BN)",
        "other depths": f"{listed(wanted.plain_depths)} layers without BN at rate {short(wanted.plain_lr)}, "
        f"{listed(wanted.batch_depths)} with BN at {listed(wanted.batch_lrs)}, {listed(wanted.wide_depths)} with the "
        f"larger start; until 90% or {wanted.depth_steps} steps",
        "seeds": listed(config.seed_list()),
    }


def _figure(config: StudyConfig, records: Records) -> Figure:
    series = [band("BN", curves(records.where(case="plain", variant="batch"), "accuracy"), "batch")]
    for lr in config.deep.lrs:
        found = curves(records.where(case="plain", variant="none", lr=lr), "accuracy")
        if found:
            series.append(band(f"without, rate {short(lr)}", found, "none"))
    for layers in config.deep.wide_depths:
        found = curves(records.where(case="wide-init", layers=layers), "accuracy")
        if found:
            series.append(band(f"without, larger start, {layers} layers", found, "control", dash=True))
    return Figure(
        "deep-curves",
        "lines",
        f"Test accuracy of {config.deep.layers} x 100 sigmoid",
        "step",
        "test accuracy",
        tuple(series),
        "Median and range over seeds. The nets with the larger start end at 90%.",
        "The net with batch normalization climbs at once; the plain nets lie at the bottom at chance; the plain nets "
        "begun with larger weights climb in between.",
        y_range=(0.0, 1.0),
    )


def _table(config: StudyConfig, records: Records) -> Table:
    groups: list[tuple[str, Records]] = [("BN", records.where(case="plain", variant="batch"))]
    groups += [("without", records.where(case="plain", variant="none", lr=lr)) for lr in config.deep.lrs]
    rows: list[tuple[Cell, ...]] = []
    for title, found in groups:
        if found.lines:
            head = found.lines[0]
            steps, tops = _steps(found), _tops(found)
            rows.append((title, head["layers"], head["lr"], *triple(steps), rounded(tops.median), len(tops.values)))
    columns = ("Net", "Layers", "Rate", "Steps to 90%", "Low", "High", "Best accuracy", "Seeds")
    return Table("Does it train?", columns, tuple(rows), "Median over seeds; an empty cell is 'never'.")


def _steps(records: Records) -> Spread:
    return spread([steps_to(curve, THRESHOLD) for curve in curves(records, "accuracy")])


def _tops(records: Records) -> Spread:
    return spread([best(curve) for curve in curves(records, "accuracy")])


def _run(
    config: StudyConfig, case: str, norm: str, seed: int, lr: float, steps: int, layers: int, **params: Any
) -> Run:
    name = run_id("deep", case, norm, layers=layers, lr=lr, seed=seed)
    cost = steps * layers * STEPS[norm] * (SHARES[norm] if "until" in params else 1.0)
    # A net at chance needs no fine look; the others' marks are told apart by their first evaluations.
    coarse = 50 if norm == "none" and not params else 10
    spec = {"lr": lr, "norm": norm, "batch": config.batch, "layers": layers, "coarse": coarse, **params}
    return Run(name, "deep", norm, seed, steps, cost, spec, {"case": case, "lr": lr, "layers": layers})
