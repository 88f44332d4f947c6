"""Normalization outside the gradient: statistics that count as constants, where that fails and where it does not.

Ioffe & Szegedy 2015, section 2: a step of gradient descent that knows nothing of the normalization is undone by it. The
last of the nets keeps statistics out of the gradient too, but re-expresses its parameters so that nothing is undone
(Desjardins et al. 2015). What it says is in ``outside_page``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

# Seconds of a step, looks included.
COSTS = {"none": 0.001, "batch": 0.0018, "outside": 0.0045, "outside-whitening": 0.006, "reprojected": 0.0035}
# Those of which every step can be asked what it keeps: their statistics are always those of the latest batch.
ASKED = ("none", "batch", "constants", "whitening")


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """The toy, and the nets, for each seed."""
    wanted = config.outside
    runs = []
    for seed in config.seed_list():
        params = {"lr": wanted.toy_lr, "at": toy_steps(config)}
        cost = wanted.toy_steps * 0.001
        runs.append(Run(run_id("outside", "toy", seed=seed), "outside", "toy", seed, wanted.toy_steps, cost, params))
        runs += [_run(config, seed, *net) for net in _nets(config)]
    return Plan(tuple(runs))


def toy_steps(config: StudyConfig) -> tuple[int, ...]:
    """The steps at which the toy is looked at."""
    last = config.outside.toy_steps
    return tuple(sorted({*(step for step in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500) if step < last), last}))


def _nets(config: StudyConfig) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    """Variant, normalization, rate and options of each net."""
    wanted = config.outside
    for lr in wanted.lrs:
        yield "constants", "outside", lr, {}
        yield "batch", "batch", lr, {}
    lr, group = max(wanted.lrs), {"group_size": wanted.group_size}
    yield "none", "none", lr, {}
    yield "whitening", "outside-whitening", lr, group
    yield "whitening-interval", "outside-whitening", lr, group | {"refresh": wanted.interval}
    yield "reprojected", "reprojected", lr, {"damping": wanted.damping}
    yield "reprojected-bare", "reprojected", lr, {"damping": wanted.small_damping}


def _run(config: StudyConfig, seed: int, variant: str, norm: str, lr: float, options: dict[str, Any]) -> Run:
    wanted = config.outside
    spec = {
        "lr": lr,
        "norm": norm,
        "batch": config.batch,
        "fine": gcd(10, wanted.every),
        "coarse": gcd(10, wanted.every),
        "every": wanted.every,
        "interval": wanted.interval,
        "kept": variant in ASKED,
        **options,
    }
    name = run_id("outside", variant, lr=lr, seed=seed)
    return Run(name, "outside", variant, seed, wanted.steps, wanted.steps * COSTS[norm], spec, {"lr": lr})


def execute(run: Run, report: Report) -> list[Record]:
    """Let the bias learn alone, or train one net on digits and look at it every few steps."""
    from batchnorm.study import data, outside_looks
    from batchnorm.study.execution import one_thread, tensors, train_mlp

    if run.variant == "toy":
        with one_thread():
            return outside_looks.toy(run, run.params["at"])
    split = data.digits(run.seed)
    looks = outside_looks.OutsideLooks(run, tensors(split.train), tensors(split.test))
    trained, _ = train_mlp(run, split, report, looks)
    return [*looks.lines, *trained]


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import outside_page

    return outside_page.section(config, records)
