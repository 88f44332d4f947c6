"""Small batches, batches of one class, lagging averages: what is run, what is measured, what is said."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from batchnorm import ConfigError
from batchnorm.study import models, sections
from batchnorm.study.config import PRESETS, StudyConfig
from batchnorm.study.records import Records
from batchnorm.study.sections import batches
from batchnorm.study.settings.batches import Batches
from study.tiny import TINY

NOTHING = Records(())


def ignore(step, accuracy):
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def tiny():
    lines = [line for run in batches.plan(TINY, NOTHING).runs for line in sections.execute(run, ignore)]
    return Records(tuple(lines))


def test_the_runs_have_names_of_their_own_and_keep_them():
    runs = batches.plan(PRESETS["default"], NOTHING).runs
    names = [run.id for run in runs]
    assert len(set(names)) == len(names) == 3 * (4 * 4 + 1 + 4 + 3)
    assert names == [run.id for run in batches.plan(PRESETS["default"], NOTHING).runs]
    assert "batches/size/renorm/size=2/seed=1" in names
    assert "batches/one-class/none/size=60/seed=0" in names
    assert "batches/lag/batch/size=60/momentum=0.01/seed=2" in names
    assert all(run.section == "batches" and run.cost > 0 for run in runs)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match=r"sizes from 2 .BN has no variance of one sample. to 1000, got 1$"):
        Batches(sizes=(1, 60))
    with pytest.raises(ConfigError, match=r"to 1000, got 1001$"):
        StudyConfig.from_toml("[batches]\nsizes = [2, 1001]")
    with pytest.raises(ConfigError, match=r"groups that divide 100 units, got 7$"):
        Batches(groups=7)


def test_what_is_compared_is_trained_alike():
    runs = batches.plan(PRESETS["default"], NOTHING).runs
    for case, size in (("size", 2), ("size", 60), ("one-class", 60)):
        group = [run for run in runs if (run.labels["case"], run.labels["size"], run.seed) == (case, size, 1)]
        assert {run.variant for run in group} >= set(batches.COMPARED)
        alike = {(run.steps, run.params["lr"], run.params["batch"], run.params.get("order")) for run in group}
        assert len(alike) == 1
    assert {run.params["order"] for run in runs if run.labels["case"] == "one-class"} == {"one-class"}
    assert {run.steps for run in runs if run.labels["case"] == "size"} == {PRESETS["default"].batches.steps}


def test_a_handful_of_steps_ends_with_records_and_a_section(tiny):
    assert tiny.finished() == {run.id for run in batches.plan(TINY, NOTHING).runs}
    part = batches.summarise(TINY, tiny)
    assert part.name == "batches"
    assert [figure.kind for figure in part.figures] == ["lines", "bars", "lines"]
    assert len(part.tables[0].rows) == 2 * 4 + 1 + 4
    assert [row[:2] for row in part.tables[1].rows] == [(0.1, 4), (0.1, 6), (0.01, 4), (0.01, 6)]
    assert batches.summarise(TINY, NOTHING) is None


def test_the_momentum_of_the_averages_has_no_part_in_training(tiny):
    for step in TINY.batches.looks:
        found = tiny.where(case="lag", metric="recalibrated", step=step)
        assert {line["momentum"] for line in found} == set(TINY.batches.momenta)
        assert len({line["value"] for line in found}) == 1


def test_only_nets_with_running_averages_are_recalibrated(tiny):
    assert set(tiny.where(metric="recalibrated").distinct("variant")) == {"batch", "renorm"}


def test_two_executions_give_the_same_records():
    run = batches.plan(TINY, NOTHING).runs[1]
    first, second = (sections.execute(run, ignore) for _ in range(2))

    def timeless(lines):
        return [line for line in lines if line["metric"] != "seconds"]

    assert timeless(first) == timeless(second)


def test_recalibration_is_that_of_the_training_data_and_leaves_the_net_alone():
    generator = torch.Generator().manual_seed(0)
    features = 3.0 * torch.rand(200, 8, generator=generator)
    tested = torch.rand(400, 8, generator=generator), torch.randint(3, (400,), generator=generator)
    model = models.mlp(8, 3, seed=1, layers=1, width=20, norm="batch", activation="relu").train()
    before = copy.deepcopy(model.state_dict())
    found = batches.recalibrated_accuracy(model, features, tested)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first, _, _, last = (part for part in model)
    w, v = (layer.weight.detach().double().numpy() for layer in (first, last))
    hidden, asked = (x.double().numpy() @ w.T for x in (features, tested[0]))
    normal = (asked - hidden.mean(0)) / np.sqrt(hidden.var(0, ddof=1) + 1e-5)
    answers = (np.maximum(normal, 0) @ v.T).argmax(1)
    assert found == pytest.approx(np.mean(answers == tested[1].numpy()))


def test_what_a_run_comes_to_is_the_median_of_its_end():
    assert batches.settled([(0, 0.0), (5, 0.9), (10, 0.5), (15, 0.3), (20, 0.4)]) == 0.4
    assert batches.settled([]) is None


SMALL = StudyConfig(
    sections=("batches",),
    batches=Batches(sizes=(2, 60), steps=10, class_steps=10, momenta=(0.1, 0.01), looks=(10, 20)),
)


def invented(sizes, one_class, *, ghost=0.96, recalibrated=0.3, lag=None, config=SMALL):
    """Records that say: ``sizes`` by net and size, ``one_class`` by net, ``lag`` by momentum (before, after)."""
    lag = lag or {0.1: (0.95, 0.95), 0.01: (0.4, 0.9)}
    lines = []
    for run in batches.plan(config, NOTHING).runs:
        case, again = run.labels["case"], recalibrated
        if case == "size":
            value = ghost if run.variant == "ghost" else sizes[run.variant][run.labels["size"]]
        elif case == "one-class":
            value = one_class[run.variant]
        else:
            value, again = lag[run.labels["momentum"]]
        for step in (10, 20) if case == "lag" else (10,):
            lines += [run.record(step, "accuracy", value), run.record(step, "recalibrated", again)]
    return batches.summarise(config, Records(tuple(lines)))


TEXTBOOK = {
    "none": {2: 0.8, 60: 0.95},
    "batch": {2: 0.4, 60: 0.96},
    "renorm": {2: 0.7, 60: 0.96},
    "group": {2: 0.85, 60: 0.955},
}
SORTED = {"none": 0.9, "batch": 0.1, "renorm": 0.7, "group": 0.92}


def test_the_words_of_the_textbook():
    part = invented(TEXTBOOK, SORTED)
    assert part.headline == (
        "In batches of 2 BN falls behind: 40.0% right (without 80.0%, Batch Renorm 70.0% and GroupNorm 85.0%); from "
        "batches of one class it learns nothing (10.0%, without BN 90.0%); where running averages lag (momentum 0.01, "
        "step 10), recalibration lifts 40.0% to 90.0%."
    )
    shown, not_shown = " ".join(part.shows), " ".join(part.does_not_show)
    assert "From 60 samples in a batch on, BN is level" in shown
    assert "Batch Renorm mends most of it: in batches of 2 it comes to 70.0%, BN to 40.0%." in shown
    assert "comes to 30.0%: it is the training that suffers." in shown
    assert "Better averages do help here: recalibrated it has 30.0%" in shown
    assert "Momentum 0.01, running averages -> recalibrated: 40.0% -> 90.0% after 10 steps" in shown
    assert "That ghost batches help: in batches of 60 cut into ghosts of 15, BN gains nothing measurable" in not_shown
    assert "in batches of 60 it is as good (95.5% against 96.0%)" in not_shown
    assert "after 20 steps at the momentum 0.1 it changes nothing measurable" in not_shown


def test_the_opposite_numbers_give_the_opposite_words():
    sizes = {
        "none": {2: 0.5, 60: 0.9},
        "batch": {2: 0.7, 60: 0.8},
        "renorm": {2: 0.6, 60: 0.9},
        "group": {2: 0.5, 60: 0.95},
    }
    part = invented(
        sizes, SORTED | {"batch": 0.8}, ghost=0.9, lag={0.1: (0.9, 0.9), 0.01: (0.9, 0.89)}, recalibrated=0.1
    )
    assert part.headline.startswith("Batches of 2 did NOT harm BN: 70.0% right")
    assert "from batches of one class it does learn (80.0%" in part.headline
    assert part.headline.endswith("recalibration brought nothing, at no momentum tried.")
    shown, not_shown = " ".join(part.shows), " ".join(part.does_not_show)
    assert "BN lies behind the net without it even at 60 samples in a batch." in shown
    assert "Batch Renorm does not help" in shown
    assert "it is the training that suffers" not in shown
    assert "BN learned all the same." in shown
    assert (
        "Ghost batches help: in batches of 60 cut into ghosts of 15, BN comes to more (90.0% against 80.0%)." in shown
    )
    assert "ghost" not in not_shown
    assert "GroupNorm should replace" not in not_shown


def test_averages_that_were_all_that_was_wrong_are_told_from_training_that_suffers():
    shown = " ".join(invented(TEXTBOOK, SORTED, recalibrated=0.8).shows)
    assert "comes to 80.0%: noisy averages were all that was wrong." in shown
    shown = " ".join(invented(TEXTBOOK, SORTED, recalibrated=0.12).shows)
    assert "Better averages do not help: recalibrated it has 12.0%" in shown
    some = TEXTBOOK | {"renorm": {2: 0.5, 60: 0.96}}
    assert "Batch Renorm mends some of it" in " ".join(invented(some, SORTED).shows)
    assert "BN loses (93.0% against 96.0%)" in " ".join(invented(TEXTBOOK, SORTED, ghost=0.93).does_not_show)


def test_without_pairs_the_algebra_of_two_is_not_told():
    config = dataclasses.replace(SMALL, batches=dataclasses.replace(SMALL.batches, sizes=(4, 60)))
    sizes = {norm: {4: item[2], 60: item[60]} for norm, item in TEXTBOOK.items()}
    part = invented(sizes, SORTED, config=config)
    assert "algebra" not in " ".join(part.shows)
    assert "In batches of 4 BN falls behind" in part.headline
    assert "algebra" in " ".join(invented(TEXTBOOK, SORTED).shows)


def test_in_a_batch_of_two_every_normalized_value_is_one_in_size():
    layer = models.mlp(4, 2, seed=0, layers=1, width=50, norm="batch")[1]
    x = 10.0 * torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x).abs(), torch.ones(2, 50), atol=1e-2)
    assert torch.equal(layer(x)[0] > 0, x[0] > x[1])
