"""Small batches, batches of a single class, and running averages that lag behind; with what helps in each.

Ioffe 2017, "Batch Renormalization", section 2: the smaller the batch and the less its samples are independent, the more
do training, by the batch's statistics, and inference, by running averages, compute different functions. Wu & He 2018,
"Group Normalization": statistics over the units of each sample know no batch. Wu & Johnson 2021, "Rethinking 'Batch' in
BatchNorm", section 3: running averages against the statistics of the weights of now. Hoffer, Hubara, Soudry 2017,
"Train longer, generalize better", algorithm 1: ghost batches.
"""

from __future__ import annotations

import copy
import math
from statistics import median
from typing import TYPE_CHECKING, Any

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section, Spread
from batchnorm.study.measures import Curve, spread
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records
from batchnorm.study.wording import Role, curves

if TYPE_CHECKING:
    import torch

TITLES: dict[str, tuple[str, Role]] = {
    "none": ("without", "none"),
    "batch": ("BN", "batch"),
    "renorm": ("Batch Renorm", "control"),
    "group": ("GroupNorm", "other"),
    "ghost": ("ghost batches", "batch"),
}
COMPARED = ("none", "batch", "renorm", "group")
# Seconds of a step.
COSTS = {"none": 0.0006, "batch": 0.0011, "renorm": 0.0022, "group": 0.0008, "ghost": 0.0013}
# What is recalibrated sees the training data in batches of this size, whatever the size that it was trained with.
RECALIBRATION = 100
# The last evaluations, so many steps apart, whose median is the accuracy that a run comes to.
SETTLED, APART = 3, 5


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Every normalization at every size and with batches of one class; BN with every momentum."""
    wanted = config.batches
    runs = []
    for seed in config.seed_list():
        for size in wanted.sizes:
            runs += [_run(config, "size", norm, seed, size, wanted.steps) for norm in COMPARED]
        ghosts = {"ghost": wanted.ghost}
        runs.append(_run(config, "size", "ghost", seed, config.batch, wanted.steps, **ghosts))
        one_class = {"order": "one-class", "lr": wanted.class_lr}
        runs += [
            _run(config, "one-class", norm, seed, config.batch, wanted.class_steps, **one_class) for norm in COMPARED
        ]
        for momentum in wanted.momenta:
            # Evaluated at all looks, and as seldom as that allows.
            looks = {"momentum": momentum, "looks": wanted.looks, "coarse": math.gcd(*wanted.looks)}
            runs.append(_run(config, "lag", "batch", seed, config.batch, max(wanted.looks), **looks))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits; where it keeps running averages, recalibrate copies of it at its looks or at the end."""
    from batchnorm.study import data
    from batchnorm.study.execution import tensors, train_mlp

    split = data.digits(run.seed)
    tested, (features, _) = tensors(split.test), tensors(split.train)
    looks = run.params.get("looks", ())
    lines: list[Record] = []

    def look(step: int, model: torch.nn.Sequential) -> None:
        if step in looks:
            lines.append(run.record(step, "recalibrated", recalibrated_accuracy(model, features, tested)))

    trained, model = train_mlp(run, split, report, look)
    if run.variant in ("batch", "renorm") and not looks:
        lines.append(run.record(run.steps, "recalibrated", recalibrated_accuracy(model, features, tested)))
    return [*lines, *trained]


def recalibrated_accuracy(
    model: torch.nn.Module, features: torch.Tensor, tested: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """The accuracy on ``tested`` of a copy of ``model`` recalibrated on ``features``; the model stays as it is."""
    from batchnorm.study.training import accuracy
    from batchnorm.surgery import recalibrate

    return accuracy(recalibrate(copy.deepcopy(model), features.split(RECALIBRATION)), tested)


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import batches_page

    return batches_page.section(config, records)


def settled(curve: Curve) -> float | None:
    """The median of the last evaluations: with few samples in a batch, each depends on the last ones drawn."""
    return median([value for _, value in curve[-SETTLED:]]) if curve else None


def comes_to(records: Records) -> Spread:
    """Over seeds, the accuracy that runs come to."""
    return spread([settled(curve) for curve in curves(records, "accuracy")])


def after(records: Records, step: int, metric: str) -> Spread:
    """Over seeds, ``metric`` after ``step`` steps."""
    found = [dict(curve).get(step) for curve in curves(records, metric)]
    return spread([value for value in found if value is not None])


def _run(config: StudyConfig, case: str, norm: str, seed: int, size: int, steps: int, **params: Any) -> Run:
    wanted = config.batches
    named = {key: params[key] for key in ("momentum",) if key in params}
    labels = {"case": case, "size": size, **named}
    spec = {
        "lr": wanted.lr,
        "norm": norm,
        "activation": "relu",
        "batch": size,
        "groups": wanted.groups,
        "fine_until": 0,
        "coarse": APART,
        **params,
    }
    name = run_id("batches", case, norm, size=size, **named, seed=seed)
    return Run(name, "batches", norm, seed, steps, steps * COSTS[norm] + 0.05, spec, labels)
