"""Normalization outside the gradient: the measures against independent ones, and words that follow the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import batchnorm
from batchnorm.study import models, outside_looks, records, run_study, sections
from batchnorm.study.plan import Run
from batchnorm.study.records import Records
from batchnorm.study.sections import outside
from study.tiny import TINY

CONFIG = dataclasses.replace(TINY, sections=("outside",))


def made(norm, **options):
    model = models.mlp(5, 3, seed=0, layers=2, width=8, norm=norm, **options)
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(40, 5, generator=generator), torch.randint(3, (40,), generator=generator)
    return model, data


def test_the_runs_of_a_plan_are_told_apart_and_stay_the_same():
    runs = outside.plan(CONFIG, Records(())).runs
    assert len({run.id for run in runs}) == len(runs)
    assert runs == outside.plan(CONFIG, Records(())).runs
    assert {run.variant for run in runs if run.params["lr"] == 0.3} == {"constants", "batch"}
    assert all(run.cost > 0 for run in runs)


def test_the_toys_bias_grows_by_its_formula_and_its_mirror_stays():
    run = Run("outside/toy", "outside", "toy", 3, 50, 0.1, {"lr": 0.1, "at": (0, 7, 50)})
    lines = Records(tuple(outside_looks.toy(run, (0, 7, 50))))
    generator = torch.Generator().manual_seed(3)
    torch.randn(100, 1, generator=generator, dtype=torch.float64)
    target = 2.0 + torch.randn(100, 1, generator=generator, dtype=torch.float64)
    constant = lines.where(layer="outside")
    for step, value in constant.curve("toy_bias"):
        assert value == pytest.approx(2 * 0.1 * step * float(target.mean()), rel=1e-9)
    losses = [value for _, value in constant.curve("toy_loss")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)
    through = lines.where(layer="batch")
    assert max(abs(value) for _, value in through.curve("toy_gradient")) < 1e-13
    assert max(abs(value) for _, value in through.curve("toy_bias")) < 1e-11


def test_what_a_step_keeps():
    for norm, bias in (("none", 1.0), ("outside", 0.0), ("outside-whitening", 0.0), ("batch", None)):
        model, data = made(norm, group_size=4)
        before = [parameter.clone() for parameter in model.parameters()]
        shares = outside_looks.kept(model, data)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert list(shares) == list(outside_looks.PARTS)
        if bias is None:
            assert shares["hidden biases"] is None
        else:
            assert shares["hidden biases"] == pytest.approx(bias, abs=1e-3)
        if norm in ("none", "batch"):
            assert shares["hidden weights"] == pytest.approx(1.0, abs=1e-3)
            assert shares["all"] == pytest.approx(1.0, abs=1e-3)
        else:
            assert 0 < shares["hidden weights"] < 0.9


def test_what_a_step_keeps_is_the_true_slope_over_the_promised_one():
    """With the statistics a function of the weights, the true slope along a step is a plain directional derivative."""
    model, (x, target) = made("outside")
    wide = model.double()
    weights = [layer.weight for layer in wide if isinstance(layer, nn.Linear)][:-1]
    promised = torch.autograd.grad(cross_entropy(wide(x.double()), target), weights)
    through = models.mlp(5, 3, seed=0, layers=2, width=8, norm="batch").double()
    through.load_state_dict(
        {name: value for name, value in wide.state_dict().items() if "held" not in name and "running" not in name},
        strict=False,
    )
    same = [layer.weight for layer in through if isinstance(layer, nn.Linear)][:-1]
    true = torch.autograd.grad(cross_entropy(through(x.double()), target), same)
    slope = sum((a * b).sum() for a, b in zip(true, promised, strict=True)) / sum(a.square().sum() for a in promised)
    assert outside_looks.kept(model, (x, target))["hidden weights"] == pytest.approx(float(slope), abs=1e-4)


def test_looks_leave_the_net_alone_and_reprojecting_changes_nothing_it_computes():
    model, data = made("reprojected", damping=0.1)
    params = {"every": 2, "interval": 4, "batch": 10, "kept": False}
    looks = outside_looks.OutsideLooks(Run("r", "outside", "reprojected", 0, 8, 1.0, params), data, data)
    before = model(data[0])
    weights = model[0].weight.clone()
    for step in (0, 1, 2):
        looks(step, model)
    assert torch.equal(model[0].weight, weights)
    looks(4, model)
    looks(8, model)
    assert not torch.equal(model[0].weight, weights)
    torch.testing.assert_close(model(data[0]), before, rtol=1e-4, atol=1e-4)
    lines = Records(tuple(looks.lines))
    assert [step for step, _ in lines.curve("change")] == [4]
    assert 0 < lines.value("change") < 1e-4
    assert [step for step, _ in lines.curve("train_loss")] == [0, 2, 4, 8]
    expected = torch.cat([layer.weight.flatten() for layer in (model[0], model[2])]).norm().item()
    assert lines.value("weight_norm") == pytest.approx(expected, rel=1e-4)


def test_a_look_judges_by_the_statistics_of_the_weights_of_now():
    model, data = made("outside")
    params = {"every": 1, "interval": 9, "batch": 10}
    looks = outside_looks.OutsideLooks(Run("r", "outside", "constants", 0, 8, 1.0, params), data, data)
    looks(1, model)
    right = (model(data[0]).argmax(1) == data[1]).float().mean()  # the statistics of the whole part, in train mode
    assert Records(tuple(looks.lines)).value("fresh_accuracy") == pytest.approx(float(right))
    assert isinstance(model[1], batchnorm.nn.NormOutsideGradient)


def test_a_tiny_run_says_everything(tmp_path):
    document = run_study(CONFIG, tmp_path / "run", workers=1)
    assert document.complete
    (section,) = document.sections
    assert section.title == sections.SECTIONS["outside"]
    assert len(section.figures) == 5
    found = records.read(tmp_path / "run" / "records.jsonl")
    assert found.where(variant="reprojected", metric="change").lines
    assert found.where(variant="constants", metric="kept", part="all").lines


def made_up(fails, still=True):
    lines = []
    for run in outside.plan(CONFIG, Records(())).runs:
        if run.variant == "toy":
            for step in run.params["at"]:
                for layer, b in (("outside", 0.4 * step), ("batch", 0.0)):
                    loss = 6.0 if still else 6.0 - 0.1 * step
                    values = {"toy_bias": b, "toy_loss": loss, "toy_gradient": 0.0}
                    lines += [run.record(step, metric, value, layer=layer) for metric, value in values.items()]
        else:
            accuracy = 0.1 if (run.variant, run.params["lr"]) in fails else 0.95
            for step, length in ((0, 10.0), (run.steps, 40.0)):
                values = {"bias_norm": length, "weight_norm": length, "train_loss": 1.0, "fresh_accuracy": accuracy}
                lines += [run.record(step, metric, value) for metric, value in {**values, "accuracy": 0.5}.items()]
                if run.params["kept"]:
                    bias = None if run.variant == "batch" else 0.0
                    lines.append(run.record(step, "kept", bias, part="hidden biases"))
                    lines.append(run.record(step, "kept", 0.25, part="hidden weights"))
        lines.append(run.finished(run.steps))
    return outside.summarise(CONFIG, Records(tuple(lines)))


def test_the_words_follow_the_numbers():
    usual = made_up({("constants", 1.0), ("whitening-interval", 1.0), ("none", 1.0), ("reprojected-bare", 1.0)})
    assert "blow a net up at rate 1: weights grow to 4 x, accuracy is 10.0% where BN is at 95.0%" in usual.headline
    assert "of the loss decrease that a step of a bias promises none comes" in usual.headline
    assert "at rate 0.3 it did NOT fail (95.0%)" in usual.headline
    told = " ".join(usual.does_not_show)
    assert "at 0.3 the net trains all the same" in told
    assert "statistics of every batch, it does not fail at rate 1" in told
    assert "the same whitening fails" in told
    assert "steps along directions without variance become enormous" in told
    assert "stays at 6." in usual.shows[0]


def test_the_words_follow_the_opposite_numbers():
    tame = made_up(set(), still=False)
    assert "did NOT make training fail at rate 1 here: accuracy 95.0%" in tame.headline
    assert "goes from 6 to 5" in tame.shows[0]
    assert "which is no worse" in " ".join(tame.does_not_show)
    everywhere = made_up({("constants", 1.0), ("constants", 0.3), ("whitening", 1.0)})
    assert "NOT" not in everywhere.headline
    told = " ".join(everywhere.does_not_show)
    assert "there the net fails too (10.0%)" in told
    assert "statistics of every batch, it fails at rate 1" in told
    assert "the same whitening does not fail" in told


def test_too_few_records_say_nothing():
    assert outside.summarise(CONFIG, Records(())) is None
