"""The loss around a net while it learns, without BN and with it: Santurkar et al. 2018, sections 2.2 and 3.1.

How much the loss varies along the gradient, how much the gradient does, and how much the step of the layers before a
layer changes its gradient: what the authors hold to be what BN does, and what they find that it does not. What the
section says is in ``landscape_page``.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

# Seconds of a step and layer, looks included.
COSTS = {"none": 0.0004, "batch": 0.0007}


@dataclass(frozen=True)
class Pair:
    """One kind of net, to be trained without BN and with it."""

    case: str
    title: str
    activation: str
    layers: int
    lr: float
    steps: int


def pairs(config: StudyConfig) -> tuple[Pair, ...]:
    """The pairs of nets."""
    wanted = config.landscape
    return (
        Pair(
            "sigmoid",
            f"{wanted.layers} x sigmoid",
            "sigmoid",
            wanted.layers,
            wanted.sigmoid_lr,
            wanted.sigmoid_steps,
        ),
        Pair("relu", f"{wanted.layers} x ReLU", "relu", wanted.layers, wanted.relu_lr, wanted.relu_steps),
        Pair("deep", f"{wanted.deep_layers} x ReLU", "relu", wanted.deep_layers, wanted.relu_lr, wanted.relu_steps),
    )


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Each pair, for each seed."""
    wanted = config.landscape
    runs = []
    for seed in config.seed_list():
        for pair in pairs(config):
            for norm in COSTS:
                spec = {
                    "lr": pair.lr,
                    "norm": norm,
                    "activation": pair.activation,
                    "layers": pair.layers,
                    "batch": config.batch,
                    "fine": wanted.every,
                    "coarse": wanted.every,
                    "shifts": wanted.shifts,
                }
                name = run_id("landscape", pair.case, norm, lr=pair.lr, seed=seed)
                cost = pair.steps * pair.layers * COSTS[norm]
                labels = {"case": pair.case, "lr": pair.lr}
                runs.append(Run(name, "landscape", norm, seed, pair.steps, cost, spec, labels))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits and look around it every few steps."""
    from batchnorm.study import data
    from batchnorm.study.execution import tensors, train_mlp
    from batchnorm.study.landscape_looks import LandscapeLooks

    split = data.digits(run.seed)
    looks = LandscapeLooks(run, tensors(split.train))
    trained, _ = train_mlp(run, split, report, looks)
    return [*looks.lines, *trained, run.record(run.steps, "seconds", round(looks.seconds, 4), what="looks")]


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import landscape_page

    return landscape_page.section(config, records)
