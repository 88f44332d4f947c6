"""How large the first weights are: the plan, the best rate of each start, and words that follow the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from batchnorm.study import models, sections, summary
from batchnorm.study.config import StudyConfig
from batchnorm.study.records import Records
from batchnorm.study.sections import initialisation
from batchnorm.study.settings.initialisation import Initialisation
from study.tiny import TINY

CONFIG = StudyConfig(
    sections=("initialisation",),
    initialisation=Initialisation(seeds=3, layers=(3, 6), stds=(0.01, 0.3, 3.0), lrs=(0.3, 1.0), steps=300),
)


def test_the_plan_is_whole_and_stable():
    runs = sections.plan("initialisation", CONFIG, Records(())).runs
    assert len({run.id for run in runs}) == len(runs) == 3 * 2 * 3 * 2 * 2
    assert runs[0].id == "initialisation/none/layers=3/std=0.01/lr=0.3/seed=0"
    assert all(run.params["judge"] == "validation" for run in runs)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_weights_have_the_deviation_that_was_asked_for(norm):
    model = models.mlp(64, 10, seed=0, layers=3, norm=norm, std=0.03)
    weights = torch.cat([layer.weight.detach().flatten() for layer in model if isinstance(layer, torch.nn.Linear)])
    assert abs(float(weights.mean())) < 0.001
    assert float(weights.std()) == pytest.approx(0.03, rel=0.02)
    assert all((layer.bias == 0).all() for layer in model if isinstance(layer, torch.nn.Linear))


def test_both_variants_begin_with_the_same_weights():
    nets = [models.mlp(64, 10, seed=4, norm=norm, std=0.3) for norm in ("none", "batch")]
    first, second = ([part.weight for part in net if isinstance(part, torch.nn.Linear)] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_run_ends_with_records():
    config = dataclasses.replace(TINY, sections=("initialisation",))
    run = sections.plan("initialisation", config, Records(())).runs[0]
    block = sections.execute(run, lambda *_: None)
    assert block[-1]["metric"] == "finished"
    assert {line["std"] for line in block} == {0.01}
    assert [line["step"] for line in block if line["metric"] == "accuracy"] == [0, 2, 4, 6]


def invented(arrives, config=CONFIG):
    """The section from records in which a net is at 90% at the step that ``arrives(norm, layers, std, lr)`` gives."""
    lines = []
    for run in sections.plan("initialisation", config, Records(())).runs:
        step = arrives(run.variant, run.labels["layers"], run.labels["std"], run.labels["lr"])
        tops = 0.92 if step else 0.2
        lines += [run.record(at, "accuracy", tops if step and at >= step else 0.1) for at in range(0, 301, 10)]
        lines.append(run.finished(300))
    found = Records(tuple(lines))
    return summary.build(config, found).sections[0], found


def paper(norm, layers, std, lr):  # noqa: ARG001 - one of the forms
    return 50 if norm == "batch" else 200 if std == 0.3 and layers == 3 else None


def test_bn_that_widens_the_range():
    section, _ = invented(paper)
    assert section.headline == (
        "Begun with weights of deviation 0.01 to 3, a net of 6 layers gets to 90% from 0 of 3 starts without BN (best "
        "accuracy 10.0% to 10.0%), 3 of 3 starts with it (92.0% to 92.0%)."
    )
    assert "3 layers begun at 0.3, where both get there: 200 steps without BN, 50 with it." in section.shows
    assert any(
        "the plain net gets there from a deviation of 0.3 with 3 layers" in line for line in section.does_not_show
    )
    assert len(section.tables[0].rows) == 2 * 2 * 3
    assert len(section.figures[0].series) == 4


def test_bn_that_does_not():
    section, _ = invented(lambda norm, *_: 200 if norm == "none" else None)
    assert section.headline.startswith("BN did NOT widen the range of starts that work here: ")
    assert any("with 6 layers, 0.01, 0.3 and 3 did not get to 90%" in line for line in section.does_not_show)
    both, _ = invented(lambda *_: 100)
    assert both.headline.startswith("BN did NOT widen")


def test_a_start_that_still_matters_with_bn():
    section, _ = invented(lambda norm, layers, std, lr: 20 if std > 0.1 else 200)  # noqa: ARG005
    assert any("it takes 20 to 200 steps to 90%, depending on it" in line for line in section.does_not_show)


def test_the_best_rate_is_chosen_for_each_start():
    def arrives(norm, layers, std, lr):  # noqa: ARG001
        return {(0.01, 0.3): 100, (0.01, 1.0): 50, (0.3, 0.3): 30, (0.3, 1.0): None}.get((std, lr))

    _, found = invented(arrives)
    starts = initialisation.starts(CONFIG, found.where(section="initialisation"), 3, "batch")
    assert {std: start.lr for std, start in starts.items()} == {0.01: 1.0, 0.3: 0.3, 3.0: 0.3}
    assert [start.steps.median for start in starts.values()] == [50, 30, None]


def test_one_rate_is_said_to_be_one():
    config = dataclasses.replace(CONFIG, initialisation=dataclasses.replace(CONFIG.initialisation, lrs=(1.0,)))
    section, _ = invented(paper, config)
    assert any("all nets were trained at the rate 1 for 300 steps" in line for line in section.does_not_show)
    assert "rate 1," in section.setup["training"]
