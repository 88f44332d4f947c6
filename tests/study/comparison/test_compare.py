"""``bn.compare`` whole: what it gives, and that it is fair."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from torch import nn

import batchnorm as bn
from study.comparison import tiny
from study.comparison.tiny import compare, make, measured


@pytest.fixture(scope="module")
def searched():
    return compare(lrs=[0.001, 0.1, 1e30], variants=("none", "batch", "group"), steps=16)


def test_a_comparison_has_a_row_and_a_verdict_for_each_variant(searched):
    assert searched.summary.complete
    assert searched.summary.kind == "comparison"
    assert [row[0] for row in searched.summary.overview.rows] == ["none", "batch", "group"]
    assert [item.variant for item in searched.verdict.judgements] == ["batch", "group"]
    assert searched.verdict.reference == "none"
    assert searched.verdict.seeds == (0, 1)
    for item in searched.verdict.judgements:
        assert item.kind in ("better", "worse", "no difference shown")
        assert item.difference.low < item.difference.mean < item.difference.high
        assert len(item.difference.values) == 2
        assert item.cost > 0
        assert item.memory > 1
        assert item.text in str(searched.verdict)
    assert str(searched).startswith("Variant")
    assert json.loads(json.dumps(searched.to_dict(), allow_nan=False))["rates"] == searched.rates()


def test_the_search_drops_what_diverges_and_takes_what_is_best(searched):
    assert set(searched.rates().values()) == {0.1}
    first = searched.records.where(section="search", variant="none", rung=0)
    assert sorted(first.distinct("lr")) == [0.001, 0.1, 1e30]
    assert first.where(lr=1e30).value("diverged") is True
    assert 1e30 not in searched.records.where(section="search", variant="none", rung=1).distinct("lr")
    assert 1e30 not in searched.records.where(section="search", rung=2).distinct("lr")


def test_every_variant_searches_the_same_rates_for_the_same_steps(searched):
    for rung in (0, 1, 2):
        lines = searched.records.where(section="search", rung=rung, metric="finished")
        counts = {name: len(lines.where(variant=name)) for name in ("none", "batch", "group")}
        assert len(set(counts.values())) == 1
        assert {line["step"] for line in lines if line["lr"] != 1e30} == {(4, 8, 16)[rung]}


def test_the_search_has_a_seed_that_is_not_measured(searched):
    assert searched.records.where(section="search").distinct("seed") == (2,)
    assert searched.records.where(section="measure").distinct("seed") == (0, 1)


def test_test_data_are_looked_at_where_validation_is_best_and_only_when_measured(searched):
    assert not searched.records.where(section="search", metric="test").lines
    for run in searched.records.where(section="measure").distinct("run"):
        lines = searched.records.where(run=run)
        place = next(line["step"] for line in lines if line["metric"] == "test")
        curve = dict(lines.curve("validation"))
        assert curve[place] == max(curve.values()) == lines.value("best_validation")
        assert min(step for step, value in curve.items() if value == curve[place]) == place


def test_the_same_seed_gives_the_same_records():
    assert measured(compare()) == measured(compare())
    assert measured(compare()) != measured(compare(seed=7))


def test_batches_and_initial_weights_are_the_same_for_all_variants():
    seen = {}

    class Seeing(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.net, self.name = make(norm), type(norm(8)).__name__

        def forward(self, x):
            if self.training:
                seen.setdefault(self.name, []).append((x.clone(), self.net[0].weight.detach().clone()))
            return self.net(x)

    compare(lambda norm: Seeing(norm), steps=6, seeds=1)
    none, batch = seen["Nothing"], seen["Batch"]
    assert len(none) == len(batch) > 6
    assert all(torch.equal(one[0], other[0]) for one, other in zip(none[-6:], batch[-6:], strict=True))
    assert torch.equal(none[-6][1], batch[-6][1])
    assert not torch.equal(none[-1][1], batch[-1][1])


def test_initial_values_are_counted(searched):
    lines = searched.records.where(section="measure", metric="same_weights")
    assert {(line["value"], line["of"]) for line in lines} == {(83, 83)}


def test_a_plain_model_gets_its_normalization_by_surgery():
    comparison = compare(tiny.plain, variants=("none", "batch", "iternorm=4"))
    assert comparison.summary.complete
    assert any("no batch norms" in note for note in comparison.config.notes)


def test_a_model_that_is_given_keeps_its_weights_for_every_seed():
    model = tiny.plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    comparison = compare(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    starts = comparison.records.where(section="measure", variant="none", metric="validation", step=0)
    assert len({line["value"] for line in starts}) == 1
    assert any("only orders differ" in note for note in comparison.config.notes)


def test_the_users_own_normalization_metric_loss_and_optimizer():
    def centred(features):
        return bn.nn.BatchNorm1d(features, affine=False)

    def negative_error(output, target):
        return -(output.argmax(1) != target).double().mean()

    comparison = compare(
        variants={"none": None, "mine": centred},
        metric=negative_error,
        loss=lambda output, target: nn.functional.multi_margin_loss(output, target),
        optimizer=functools.partial(torch.optim.RMSprop),
    )
    assert [row[0] for row in comparison.summary.overview.rows] == ["none", "mine"]
    assert comparison.config.metric == "negative_error"
    assert all(-1 <= line["value"] <= 0 for line in comparison.records.where(metric="test"))


def test_regression_is_told_from_the_target():
    features, _ = tiny.arrays()
    target = features[:, 0] * 2 + 0.1
    model = lambda norm: nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 1))  # noqa: E731
    comparison = compare(model, (features, target), steps=60, lrs=[0.005])
    assert comparison.config.task == "regression"
    assert comparison.config.metric == "r2"
    assert all(line["value"] > 0.5 for line in comparison.records.where(metric="test"))
    assert not compare(model, (features, target), metric="mae").config.higher


def test_one_seed_is_no_verdict():
    judgement = compare(seeds=1).verdict.judgements[0]
    assert judgement.kind == "one seed"
    assert "one seed shows no uncertainty" in judgement.text


def test_a_run_that_diverges_is_said():
    comparison = compare(lrs=[1e30])
    assert comparison.verdict.judgements[0].kind == "diverged"
    assert "diverged" in comparison.verdict.text
    assert all(math.isfinite(line["value"]) for line in comparison.records if isinstance(line["value"], float))


@pytest.mark.parametrize("amp", ["bf16", True])
def test_autocast(amp):
    comparison = compare(amp=amp, steps=8)
    assert comparison.config.amp == "bf16"
    assert comparison.summary.complete


def test_compiled_it_comes_to_the_same(monkeypatch):
    compiled, whole = [], torch.compile

    def compile_(model):
        compiled.append(model)
        return whole(model, backend="aot_eager", fullgraph=True)

    options = {"seeds": 1, "steps": 8, "variants": ("none", "batch")}
    plain = compare(**options)
    monkeypatch.setattr(torch, "compile", compile_)
    comparison = compare(compile=True, **options)
    assert comparison.config.compile
    assert len(compiled) >= 2
    losses = [[line["value"] for line in measured(found)] for found in (plain, comparison)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [line["value"] for line in comparison.records if line.get("what") == "first step"]


def test_sequences_with_lengths_through_a_loader():
    torch.manual_seed(0)
    x, lengths, y = torch.randn(200, 2, 9), torch.randint(3, 10, (200,)), torch.arange(200) % 2
    x += 2 * y[:, None, None]

    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.convolution, self.norm, self.head = nn.Conv1d(2, 4, 3, padding=1), norm(4), nn.Linear(4, 2)

        def forward(self, x, lengths):
            return self.head(self.norm(self.convolution(x), lengths=lengths).mean(2))

    sets = [
        torch.utils.data.TensorDataset(x[part], lengths[part], y[part]) for part in (slice(0, 100), slice(100, 200))
    ]
    data = [torch.utils.data.DataLoader(part, batch_size=10, shuffle=not place) for place, part in enumerate(sets)]
    comparison = compare(Net, data, variants=("none", "batch", "group=2", "layer", "instance"))
    assert comparison.config.samples == (100, 50, 50)
    assert any("every second batch" in note for note in comparison.config.notes)


def test_runs_in_other_processes_come_out_the_same(tmp_path):
    alone = compare(tiny.plain, lrs=[0.05, 0.2], out=tmp_path / "one")
    together = compare(tiny.plain, lrs=[0.05, 0.2], workers=2, out=tmp_path / "two")
    assert measured(alone) == measured(together)


def test_scalars_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    compare(out=tmp_path / "run", tensorboard=True)
    found = list((tmp_path / "run" / "tensorboard").glob("*/events*"))
    assert len(found) == 4


def test_the_page(searched, tmp_path):
    pytest.importorskip("plotly")
    page = searched.to_html(tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    for part in ("Verdict", "Learning curves", "Learning rates", "Cost", "How it was kept fair"):
        assert part in text
