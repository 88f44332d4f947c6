"""Section 1: steps to 90%, with BN and without, beside the cases in which the ratio is smaller or BN fails.

Ioffe & Szegedy 2015, section 4.1 (the network) and 4.2 (steps to the baseline's accuracy). The baseline's rate is tuned
here, on validation accuracy; the tuning runs never see the test part. What it comes to is said in ``headline_page``.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.measures import Curve, best, steps_to
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

THRESHOLD = 0.9
FURTHER = 0.95
# Seconds of a step, by layer, for the time left: a guess is enough.
PLAIN_STEP, BATCH_STEP = 0.0013, 0.0024
# The kinds of net whose rate is tuned, with their parameters: the paper's, and the two that need BN less.
NETS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "wide-init": {"gain": 4.0},
    "relu": {"activation": "relu"},
}


def plan(config: StudyConfig, records: Records) -> Plan:
    """Tune first; what follows is measured at the tuned rates."""
    tuning = [
        _run(
            config,
            f"tune-{net}",
            "none",
            seed,
            lr,
            steps,
            case=f"tune-{net}",
            judge="validation",
            until=THRESHOLD,
            **params,
        )
        for net, params in nets(config).items()
        for lr in rates(config, net)
        # The rate is chosen on fewer seeds than are then measured: its curve is flat where it is best.
        for seed in config.seed_list()
        for steps in [config.headline.tune_steps if net == "tuned" else config.headline.counter_steps]
    ]
    if records.finished().issuperset(run.id for run in tuning):
        return Plan((*tuning, *_measuring(config, {net: tuned_rate(config, records, net) for net in NETS})))
    # The cost hardly depends on the rates: any will do for the estimate.
    expected = _measuring(config, {net: rates(config, net)[0] for net in NETS})
    return Plan(tuple(tuning), later=sum(run.cost for run in expected))


def _measuring(config: StudyConfig, tuned: dict[str, float]) -> list[Run]:
    wanted = config.headline
    runs = []
    for seed in config.seed_list("headline"):
        # Evaluated finely for longer: where the net with BN passes the tuned baseline's best is to be resolved as well.
        runs += [
            _run(config, "tuned", norm, seed, tuned["tuned"], steps, case="tuned", fine_until=300)
            for norm, steps in (("none", wanted.steps), ("batch", wanted.batch_steps))
        ]
    for seed in config.seed_list():
        slow, few = wanted.conservative_lr, wanted.counter_steps
        for norm, lr, steps in (
            ("none", slow, wanted.conservative_steps),
            ("batch", slow, few),
            ("batch", 5 * slow, few),
        ):
            runs.append(_run(config, "conservative", norm, seed, lr, steps, case="conservative", until=THRESHOLD))
        for norm in ("none", "batch"):
            wide, relu = nets(config)["wide-init"], nets(config)["relu"]
            # Not stopped at its marks: where a net that begins well ends is a question of its own.
            runs.append(
                _run(config, "wide-init", norm, seed, tuned["wide-init"], wanted.wide_steps, case="wide-init", **wide)
            )
            runs.append(_run(config, "relu", norm, seed, tuned["relu"], few, case="relu", until=FURTHER, **relu))
        runs.append(
            _run(config, "hot", "batch", seed, wanted.hot_factor * tuned["tuned"], wanted.hot_steps, case="hot")
        )
    return runs


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits."""
    from batchnorm.study import data
    from batchnorm.study.execution import train_mlp

    lines, _ = train_mlp(run, data.digits(run.seed), report)
    return lines


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import headline_page

    return headline_page.section(config, records)


def nets(config: StudyConfig) -> dict[str, dict[str, Any]]:
    """The kinds of net and their parameters."""
    return NETS | {"wide-init": {"gain": config.headline.wide_init}}


def rates(config: StudyConfig, net: str) -> tuple[float, ...]:
    """The grid over which the rate of ``net`` is tuned, without BN."""
    wanted = config.headline
    return {"tuned": wanted.lrs, "wide-init": wanted.wide_lrs, "relu": wanted.relu_lrs}[net]


def tuned_rate(config: StudyConfig, records: Records, net: str) -> float:
    """The rate at which ``net`` without BN reaches 90% of validation first: the median over seeds decides.

    Where no rate gets there, the one with the highest validation accuracy.
    """
    scores: dict[float, tuple[float, float]] = {}
    for lr in rates(config, net):
        found = by_seed(records, f"tune-{net}", "none", lr).values()
        steps = [steps_to(curve, THRESHOLD) for curve in found]
        tops = [best(curve) or 0.0 for curve in found]
        if found:
            scores[lr] = (median([float("inf") if step is None else step for step in steps]), -median(tops))
    return min(scores, key=lambda lr: scores[lr])


def by_seed(records: Records, case: str, norm: str, lr: float | None = None) -> dict[int, Curve]:
    """The accuracy curve of each seed of a case."""
    found = records.where(case=case, variant=norm, metric="accuracy")
    found = found if lr is None else found.where(lr=lr)
    return {seed: found.where(seed=seed).curve("accuracy") for seed in sorted(found.distinct("seed"))}


def _run(
    config: StudyConfig, part: str, norm: str, seed: int, lr: float, steps: int, *, case: str, **params: Any
) -> Run:
    name = run_id("headline", part, norm, lr=lr, seed=seed)
    # A tuning or counter-example's run ends at its mark, on the average at about half its steps.
    cost = steps * (PLAIN_STEP if norm == "none" else BATCH_STEP) * (0.6 if "until" in params else 1.0)
    spec = {"lr": lr, "norm": norm, "batch": config.batch, **params}
    return Run(name, "headline", norm, seed, steps, cost, spec, {"case": case, "lr": lr})
