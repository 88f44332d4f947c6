"""The loss around nets: looks against independent computations, and words that follow the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from batchnorm.study import landscape_looks, models, records, run_study, sections, training
from batchnorm.study.plan import Run
from batchnorm.study.records import Records
from batchnorm.study.sections import landscape
from study.tiny import TINY

CONFIG = dataclasses.replace(TINY, sections=("landscape",))


def test_the_runs_of_a_plan_are_told_apart_and_stay_the_same():
    runs = landscape.plan(CONFIG, Records(())).runs
    assert len({run.id for run in runs}) == len(runs) == 6
    assert runs == landscape.plan(CONFIG, Records(())).runs
    assert {(run.labels["case"], run.variant) for run in runs} == {
        (case, norm) for case in ("sigmoid", "relu", "deep") for norm in ("none", "batch")
    }


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_look_is_what_steps_by_hand_find(norm):
    lr, generator = 0.2, torch.Generator().manual_seed(1)
    data = torch.randn(40, 5, generator=generator), torch.randint(3, (40,), generator=generator)
    model = models.mlp(5, 3, seed=0, layers=2, width=8, norm=norm)
    run = Run("r", "landscape", norm, 7, 10, 1.0, {"lr": lr, "batch": 10, "shifts": 1})
    looks = landscape_looks.LandscapeLooks(run, data)
    looks(0, model)
    (line,) = looks.lines
    found = line["value"]
    x, target = next(training.batches(data, 10, 7 + landscape_looks._APART))
    theta = [parameter.detach().clone() for parameter in model.parameters()]

    def there(eta, moved=slice(None)):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), theta, strict=True):
                parameter.copy_(value)
            for parameter, part in list(zip(model.parameters(), gradient, strict=True))[moved]:
                parameter -= eta * part
        loss = cross_entropy(model(x), target)
        return loss.item(), torch.autograd.grad(loss, list(model.parameters()))

    gradient = [torch.zeros_like(value) for value in theta]
    loss, gradient = there(0.0)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    etas = [lr * factor for factor in (0.5, 1.0, 2.0, 4.0)]
    after = [there(eta) for eta in etas]
    assert found["least"] == pytest.approx(min(value for value, _ in after), rel=1e-4)
    assert found["most"] == pytest.approx(max(value for value, _ in after), rel=1e-4)

    def far(other):
        return sum(((a - b) ** 2).sum() for a, b in zip(other, gradient, strict=True)).sqrt().item()

    length = sum((part**2).sum() for part in gradient).sqrt().item()
    assert found["change"] == pytest.approx(max(far(other) for _, other in after), rel=1e-3)
    steep = max(far(other) / (eta * length) for eta, (_, other) in zip(etas, after, strict=True))
    assert found["smoothness"] == pytest.approx(steep, rel=1e-3)
    # The last linear layer, when all parameters but its own have taken their step.
    _, shifted = there(lr, slice(None, -2))
    shift = sum(((a - b) ** 2).sum() for a, b in zip(shifted[-2:], gradient[-2:], strict=True)).sqrt().item()
    assert found["shifts"] == [pytest.approx(shift, rel=1e-3)]
    assert found["passes"] == 2 * (1 + 4 + 1)


def test_a_look_leaves_the_net_alone():
    data = torch.randn(40, 5), torch.randint(3, (40,))
    model = models.mlp(5, 3, seed=0, layers=2, width=8, norm="batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Run("r", "landscape", "batch", 0, 10, 1.0, {"lr": 0.1, "batch": 10, "shifts": 2})
    looks = landscape_looks.LandscapeLooks(run, data)
    looks(0, model)
    looks(1, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert looks.seconds > 0
    assert looks.lines[0]["value"]["loss"] != looks.lines[1]["value"]["loss"]  # another batch


def test_a_tiny_run_says_everything(tmp_path):
    document = run_study(CONFIG, tmp_path / "run", workers=1)
    assert document.complete
    (section,) = document.sections
    assert section.title == sections.SECTIONS["landscape"]
    assert len(section.figures) == 4
    assert "passes where a step takes 2" in section.does_not_show[-1]
    found = records.read(tmp_path / "run" / "records.jsonl")
    pair = found.where(case="relu", metric="landscape")
    assert {line["step"] for line in pair} == {0, 2, 4, 6}


def made_up(factor, shift_factor=None, late_only=False):
    """BN's measures are ``factor`` times the plain net's; before the middle of the steps 1 / factor, if late_only."""
    lines = []
    for run in landscape.plan(CONFIG, Records(())).runs:
        for step in (0, 2, 4, 6):
            wide, far = 1.0, 1.0
            if run.variant == "batch":
                early = late_only and step <= 3
                wide = 1 / factor if early else factor
                far = wide if shift_factor is None else shift_factor
            look = {"loss": 1.0, "least": 1.0, "most": 1.0 + wide, "gradient": 1.0, "change": wide, "smoothness": wide}
            layers = {"shifts": [far, far], "gradients": [1.0, 1.0], "cosines": [0.5, 0.5], "passes": 14}
            lines.append(run.record(step, "landscape", {**look, **layers}))
        lines.append(run.record(6, "seconds", 0.5, what="looks"))
        lines.append(run.record(6, "seconds", 2.0, what="run"))
        lines.append(run.finished(6))
    return landscape.summarise(CONFIG, Records(tuple(lines)))


def test_the_words_follow_the_numbers():
    smoother = made_up(0.1)
    assert "varies less along the gradient with BN (3 of 3 pairs of nets, 0.1 x as much)" in smoother.headline
    assert "and the gradient form of covariate shift is less in 6 of 6 layers." in smoother.headline
    assert "FIRST" not in smoother.headline
    assert not any("always falls" in text for text in smoother.does_not_show)
    assert "looks were 25.0% of the time" in smoother.does_not_show[-1]


def test_the_words_follow_the_opposite_numbers():
    rougher = made_up(3.0)
    assert "varies NOT less along the gradient with BN (0 of 3 pairs of nets, 3 x as much)" in rougher.headline
    assert "but the gradient form of covariate shift is less in 0 of 6 layers" in rougher.headline
    shifted = made_up(0.1, shift_factor=2.0)
    assert "but the gradient form of covariate shift is less in 0 of 6 layers" in shifted.headline
    assert "the covariate shift (2 of 2)" in " ".join(shifted.does_not_show)
    plateau = made_up(0.1, late_only=True)
    assert "in the FIRST half the loss varies MORE with BN for" in plateau.headline
    assert "covariate shift is less in only 0 of 6" in plateau.headline
    assert any("stuck at chance" in text for text in plateau.does_not_show)


def test_what_is_no_number_counts_as_more_than_any():
    lines = []
    for line in made_up_lines():
        if line["metric"] == "landscape" and line["variant"] == "none":
            value = {**line["value"], "most": None, "change": None, "smoothness": None, "shifts": [None, None]}
            line = {**line, "value": value}
        lines.append(line)
    section = landscape.summarise(CONFIG, Records(tuple(lines)))
    assert "(3 of 3 pairs of nets" in section.headline
    assert "6 of 6 layers" in section.headline


def made_up_lines():
    lines = []
    for run in landscape.plan(CONFIG, Records(())).runs:
        for step in (2, 6):
            look = {"loss": 1.0, "least": 0.5, "most": 2.0, "gradient": 1.0, "change": 1.0, "smoothness": 1.0}
            layers = {"shifts": [1.0, 1.0], "gradients": [1.0, 1.0], "cosines": [0.5, 0.5], "passes": 14}
            lines.append(run.record(step, "landscape", {**look, **layers}))
    return lines


def test_too_few_records_say_nothing():
    assert landscape.summarise(CONFIG, Records(())) is None
