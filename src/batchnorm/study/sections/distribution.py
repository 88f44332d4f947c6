"""Section 3: the input of a typical unit of the last hidden layer while the net learns, and the noisy-BN control.

Ioffe & Szegedy 2015, Figure 1 (b, c): the {15, 50, 85} percentiles. Santurkar et al. 2018, section 2.2: noise after BN
that makes the distributions jump more than they ever did, and does no harm. What it says is in ``distribution_page``.
"""

from __future__ import annotations

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run, run_id
from batchnorm.study.records import Record, Records

# Movement is given for so many steps: the way travelled over looks ``every`` steps apart, not the distance at the end.
PER = 100
COSTS = {"none": 0.0007, "batch": 0.0014, "noisy": 0.0016}


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
    Records ``percentiles`` (the typical unit's, three numbers), and ``movement`` and ``movement_absolute`` since the
    look before, per 100 steps.
    """
    import torch

    from batchnorm.probes import InputPercentiles, movement, typical_unit
    from batchnorm.study import data, models
    from batchnorm.study.execution import tensors, train_mlp

    split = data.digits(run.seed)
    features, _ = tensors(split.validation)
    every = run.params["every"]
    looks = {}
    lines: list[Record] = []

    @torch.no_grad()
    def look(step: int, model: torch.nn.Sequential) -> None:
        if step % every:
            return
        model.eval()
        models.shake(model, True)
        with InputPercentiles(models.last_hidden_activation(model)) as probe:
            model(features)
        models.shake(model, False)
        model.train()
        looks[step] = probe.look
        lines.append(run.record(step, "percentiles", [round(p, 6) for p in typical_unit(probe.look.percentiles)]))
        before = looks.get(step - every)
        if before is not None:
            for metric, deviations in (("movement", before.deviations), ("movement_absolute", None)):
                moved = movement(before.percentiles, probe.look.percentiles, deviations)
                if moved < float("inf"):
                    lines.append(run.record(step, metric, round(moved * PER / every, 6)))

    trained, _ = train_mlp(run, split, report, look)
    return [*lines, *trained]


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """The section of the document."""
    from batchnorm.study.sections import distribution_page

    return distribution_page.section(config, records)
