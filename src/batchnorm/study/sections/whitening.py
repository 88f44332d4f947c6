"""Whitening layers beside BN: does taking out the correlation between units help further, and what does it cost?

Huang et al. 2018 and 2019: whitening over the batch in groups of units, with the gradient through it, by eigenvalues
(``DecorrelatedBatchNorm``) and by Newton's iteration (``IterNorm``). What it says is in ``whitening_page``.
"""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

# Runs end here.
UNTIL = 0.95
# Seconds of a step, of those that are needed.
COSTS = {"batch": 0.0012, "iternorm": 0.0045, "decorrelated": 0.004}


def nets(config: StudyConfig) -> Iterator[tuple[str, int]]:
    """The kinds of normalization and their group sizes; BN's is 1."""
    yield "batch", 1
    for group in config.whitening.groups:
        yield "iternorm", group
    for group in config.whitening.eigen_groups:
        yield "decorrelated", group


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Each net at each rate, for each seed."""
    wanted = config.whitening
    runs = []
    for seed in config.seed_list():
        for activation, lrs in (("sigmoid", wanted.sigmoid_lrs), ("relu", wanted.relu_lrs)):
            for lr in lrs:
                for norm, group in nets(config):
                    spec = {
                        "lr": lr,
                        "norm": norm,
                        "activation": activation,
                        "group_size": group,
                        "batch": config.batch,
                        # Judged on the validation part: a rate is chosen by it.
                        "judge": "validation",
                        "until": UNTIL,
                    }
                    name = run_id("whitening", activation, norm, group=group, lr=lr, seed=seed)
                    labels = {"case": activation, "group": group, "lr": lr}
                    cost = wanted.steps * COSTS[norm]
                    runs.append(Run(name, "whitening", norm, seed, wanted.steps, cost, spec, labels))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits."""
    from batchnorm.study import data
    from batchnorm.study.execution import train_mlp

    lines, _ = train_mlp(run, data.digits(run.seed), report)
    return lines


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import whitening_page

    return whitening_page.section(config, records)
