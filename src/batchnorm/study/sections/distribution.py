"""Section 3: the input of a typical unit of the last hidden layer while the net learns, and the noisy-BN control.

Ioffe & Szegedy 2015, Figure 1 (b, c): the {15, 50, 85} percentiles. Santurkar et al. 2018, section 2.2: noise after BN
that makes the distributions jump more than they ever did, and does no harm. What it says is in ``distribution_page``.
"""

from __future__ import annotations

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

COSTS = {"none": 0.0017, "batch": 0.0022, "noisy": 0.0027}


def plan(config: StudyConfig, records: Records) -> Plan:  # noqa: ARG001 - nothing here depends on results
    """Three variants at the working rate, two at the slow one."""
    wanted = config.distribution
    runs = []
    for seed in config.seed_list():
        slow = ((wanted.slow_lr, ("none", "batch")),) if wanted.slow else ()
        for lr, variants in ((wanted.lr, ("none", "batch", "noisy")), *slow):
            for variant in variants:
                spec = {"lr": lr, "norm": variant, "batch": config.batch, "every": wanted.every}
                if variant == "noisy":
                    spec["noise"] = (wanted.noise_shift, wanted.noise_scale)
                name = run_id("distribution", variant, lr=lr, seed=seed)
                cost = wanted.steps * COSTS[variant]
                runs.append(Run(name, "distribution", variant, seed, wanted.steps, cost, spec, {"lr": lr}))
    return Plan(tuple(runs))


def execute(run: Run, report: Report) -> list[Record]:
    """Train one net on digits and look at its last hidden layer every few steps.

    Each look is at the validation part in eval mode; the noisy variant's noise is in force in it, as in training.
    """
    from batchnorm.study import data
    from batchnorm.study.execution import tensors, train_mlp
    from batchnorm.study.looks import InputLooks

    split = data.digits(run.seed)
    looks = InputLooks(run, tensors(split.validation)[0], run.params["every"])
    trained, _ = train_mlp(run, split, report, looks)
    return [*looks.lines, *trained]


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import distribution_page

    return distribution_page.section(config, records)
