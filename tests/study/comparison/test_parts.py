"""The parts of a comparison, each by itself: the plan, the verdict's arithmetic, data, models, budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.study.comparison import intervals, norms, planning, settings, variants, verdict
from batchnorm.study.comparison.building import Builder
from batchnorm.study.comparison.data import LoaderData, split_batch
from batchnorm.study.comparison.objective import Objective
from batchnorm.study.comparison.opening import decide, open_data, split
from batchnorm.study.records import Records
from study.comparison import tiny

scipy_stats = pytest.importorskip("scipy.stats")


def test_budgets_are_read():
    assert [settings.seconds(text) for text in ("45s", "10m", "1h30m", "2 h", "90", 7, 0.5, "1m5s")] == [
        45,
        600,
        5400,
        7200,
        90,
        7,
        0.5,
        65,
    ]


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    comparison = tiny.compare(out=tmp_path / "run", variants=("none", "ghost=4"))
    found = settings.CompareConfig.load(tmp_path / "run" / "config.toml")
    assert found == comparison.config
    assert found.variants == ("none", "ghost=4")


def test_the_intervals_are_students_for_pairs():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    found = intervals.interval(list(ours - theirs), 1)
    expected = scipy_stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    guarded = intervals.interval(list(ours - theirs), 4)
    expected = scipy_stats.ttest_rel(ours, theirs).confidence_interval(1 - 0.05 / 4)
    assert (guarded.low, guarded.high) == pytest.approx((expected.low, expected.high))


def test_equal_differences_do_not_make_an_interval_of_no_width():
    found = intervals.interval([0.02, 0.02, 0.02], 1, resolution=0.01)
    assert found.high - found.low == pytest.approx(2 * 4.302653 * 0.01 / math.sqrt(12) / math.sqrt(3))


def test_a_verdict_of_no_difference_is_right_as_often_as_it_says():
    rng = np.random.default_rng(1)
    # Three comparisons without a difference: in 95% of the cases none of them shows one.
    wrong = sum(
        any(not found.low <= 0 <= found.high for found in (intervals.interval(list(row), 3) for row in rows))
        for rows in rng.normal(0, 1, (1000, 3, 4))
    )
    assert wrong < 70


def of_curves(curves):
    """Records of measured runs, by variant and seed."""
    lines = []
    for (name, seed), curve in curves.items():
        run = f"measure/{name}/seed={seed}"
        head = {"section": "measure", "variant": name, "seed": seed, "run": run}
        lines += [head | {"step": step, "metric": "validation", "value": value} for step, value in curve]
    return Records(tuple(lines))


def test_the_mark_is_95_percent_of_the_references_way():
    config = tiny.compare().config
    records = of_curves(
        {
            ("none", 0): [(0, 0.1), (10, 0.5), (20, 0.9), (30, 0.9), (40, 0.9)],
            ("none", 1): [(0, 0.3), (10, 0.5), (20, 0.7), (30, 0.7), (40, 0.7)],
            ("batch", 0): [(0, 0.1), (10, 0.8), (20, 0.7), (30, 0.8), (40, 0.8)],
        }
    )
    own = {name: verdict.by_seed(records, name) for name in ("none", "batch")}
    mark = verdict.mark_of(config, own["none"])
    assert mark == pytest.approx(0.2 + 0.95 * 0.6)
    assert verdict.arrivals(config, own["none"], mark) == {0: 20, 1: None}
    # One evaluation alone at the mark does not count.
    assert verdict.arrivals(config, own["batch"], mark) == {0: 30}


def test_for_a_loss_less_is_better():
    config = tiny.compare(metric="loss").config
    records = of_curves({("none", 0): [(0, 2.0), (10, 1.0), (20, 0.2), (30, 0.0), (40, 0.0)]})
    own = verdict.by_seed(records, "none")
    mark = verdict.mark_of(config, own)
    assert mark == pytest.approx(0.1)
    assert verdict.arrivals(config, own, mark) == {0: 30}


def test_evaluations_hold_the_rungs_and_are_denser_at_the_beginning():
    for steps, count in ((24, 8), (1000, 30), (4, 30), (37, 12)):
        at = planning.evaluations(steps, count)
        assert at[0] == 0
        assert at[-1] == steps
        assert {math.ceil(steps / 4), math.ceil(steps / 2)} <= set(at)
    assert at[1] - at[0] <= at[-1] - at[-2]


def test_a_budget_is_kept_by_what_a_step_takes():
    config = settings.replaced(tiny.compare().config, budget=100.0, steps=0, lrs=(0.1, 0.2, 0.3, 0.4), seeds=3)
    head = {"section": "calibrate", "seed": 0, "step": 0, "metric": "seconds", "run": "calibrate"}
    lines = [
        head | {"variant": name, "what": what, "value": value}
        for name in config.variants
        for what, value in (("step", 0.01), ("evaluation", 0.02), ("start", 0.1), ("first step", 0.5))
    ]
    steps, count = planning.size(config, Records(tuple(lines)))
    # Search: 4 x 1/4, 2 x 1/4, 2 x 1/2; then 3 seeds: 5.5 runs of each of 2 variants.
    assert planning.lengths(config) == pytest.approx(5.5)
    taken = 2 * (5.5 * (steps * 0.01 + count * 0.02 * 1.4) + 11 * 0.1)
    assert 70 < taken <= 75
    compiled = planning.size(settings.replaced(config, compile=True), Records(tuple(lines)))
    assert compiled[0] < steps


@pytest.mark.parametrize("seconds", [1e-6, 1.0])
def test_where_steps_are_given_no_time_decides(seconds):
    config = settings.replaced(tiny.compare().config, steps=400, batch_size=16)
    head = {"section": "calibrate", "seed": 0, "step": 0, "run": "calibrate", "variant": "none"}
    line = head | {"metric": "seconds", "what": "evaluation", "value": seconds}
    for batches, count in ((1, 30), (60, 12), (10_000, planning.DENSE)):
        judged = settings.replaced(config, samples=(1000, 16 * batches, 1000))
        assert planning.size(judged, Records((line,))) == (400, count)


def test_a_small_budget_thins_an_automatic_grid():
    config = settings.replaced(tiny.compare().config, budget=10.0, steps=0, auto=True, lrs=settings.RATES["sgd"])
    head = {"section": "calibrate", "seed": 0, "step": 0, "metric": "seconds", "run": "calibrate"}
    lines = [
        head | {"variant": name, "what": what, "value": value}
        for name in config.variants
        for what, value in (("step", 0.01), ("evaluation", 0.0), ("start", 0.0), ("first step", 0.0))
    ]
    done = Records((*lines, head | {"variant": "none", "metric": "finished", "value": True}))
    assert planning.settled(config, done).lrs == (0.001, 0.01, 0.1, 1.0)
    assert planning.settled(settings.replaced(config, budget=100.0), done) == settings.replaced(config, budget=100.0)
    assert planning.settled(settings.replaced(config, auto=False), done).lrs == config.lrs


def test_variants_are_read():
    found = variants.read(("none", "ghost=8", "group"), 32)
    assert [variant.name for variant in found] == ["none", "ghost=8", "group"]
    assert found[1](6).virtual_batch_size == 8
    assert variants.read("none,ghost", 32)[1](6).virtual_batch_size == 8
    assert found[2](48).num_groups == 12


@pytest.mark.parametrize("kind", [kind for kind in variants.KINDS if kind != "instance"])
def test_every_layer_takes_any_rank(kind):
    layer = norms.make(kind, None, 4, 16)
    for shape in ((16, 4), (16, 4, 3), (16, 4, 3, 2)):
        assert layer(torch.randn(shape)).shape == shape
    assert layer(torch.randn(16, 4, 3), lengths=torch.full((16,), 2)).shape == (16, 4, 3)


@pytest.mark.parametrize("kind", ["group", "layer", "instance"])
def test_padding_does_not_count_in_norms_of_a_sample(kind):
    layer = norms.make(kind, None, 4, 16)
    x, lengths = torch.randn(3, 4, 7), torch.tensor([7, 5, 2])
    with torch.no_grad():
        layer.weight.uniform_(), layer.bias.uniform_()
    found = layer(x, lengths=lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row : row + 1, :, :length], layer(x[row : row + 1, :, :length]))


@pytest.mark.parametrize("affine", [True, False])
def test_without_normalization_beta_stays_as_a_bias(affine):
    layers = (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=affine), nn.ReLU(), nn.Linear(8, 2))
    builder = Builder(nn.Sequential(*layers), torch.randn(4, 6))
    found = builder.build(variants.read(("none", "batch"), 8)[0], 0)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in found.modules())
    assert (found[1].bias is not None) == affine
    x = torch.randn(4, 6)
    assert torch.equal(found(x), found[3](found[2](found[0](x))))


def test_fused_activations_stay():
    norm = bn.nn.BatchNorm2d(4, activation="relu")
    builder = Builder(nn.Sequential(nn.Conv2d(2, 4, 3), norm), torch.randn(4, 2, 5, 5))
    for name in ("none", "group", "iternorm"):
        found = builder.build(variants.read(("batch", name), 8)[1], 0)
        assert found(torch.randn(4, 2, 5, 5)).min() >= 0


def test_the_argument_is_found_by_its_name():
    def make(width=8, norm_layer=nn.BatchNorm1d):
        return nn.Sequential(nn.Linear(6, width), norm_layer(width))

    builder = Builder(make, None)
    assert builder.keyword == "norm_layer"
    assert isinstance(builder.build(variants.read(("none", "group"), 8)[1], 0)[1], norms.Group)


def test_initial_weights_are_copied_where_shapes_allow():
    first, second = tiny.plain(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    same = Builder(tiny.plain, None).begin_alike(second, first)
    assert torch.equal(first[0].weight, second[0].weight)
    assert same == (56, 83)


def test_loaders_give_the_same_batches_for_the_same_seed_and_from_any_place():
    data = LoaderData(tiny.loaders())

    def first(seed, skip, count):
        return [batch.inputs for _, batch in zip(range(count), data.stream(seed, skip), strict=False)]

    whole = first(0, 0, 20)
    torch.randn(5)  # what a model draws makes no difference
    assert all(torch.equal(one, other) for one, other in zip(whole, first(0, 0, 20), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(whole[11:], first(0, 11, 9), strict=True))
    assert not torch.equal(whole[0], first(1, 0, 1)[0])
    assert not torch.equal(whole[0], whole[8])


def test_a_loaders_own_generator_goes_on_from_where_it_was():
    train, validation, test = tiny.loaders()
    generator = torch.Generator().manual_seed(5)
    train = torch.utils.data.DataLoader(train.dataset, batch_size=16, shuffle=True, generator=generator)
    before = generator.get_state()
    tiny.compare(data=[train, validation, test])
    assert torch.equal(generator.get_state(), before)


def test_the_random_state_is_as_before():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.randn(2), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    tiny.compare(tiny.plain)
    assert torch.equal(torch.randn(2), expected[0])
    assert np.random.rand() == expected[1]  # noqa: NPY002


def test_batches_are_read():
    x, y = torch.randn(4, 2), torch.arange(4)
    assert torch.equal(split_batch((x, y)).target, y)
    assert len(split_batch((x, x, y)).inputs) == 2
    assert list(split_batch({"input_ids": x, "labels": y}).inputs) == ["input_ids"]


def test_parts_are_apart_and_in_proportion():
    target = torch.tensor([0] * 150 + [1] * 50)
    parts = split(target, 2, "x")
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(200))
    assert [len(part) for part in parts.values()] == [120, 40, 40]
    assert [int(target[part].sum()) for part in parts.values()] == [30, 10, 10]


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (torch.arange(90) % 3, "classification", 3),
        (torch.arange(90).float() % 3 + 5, "classification", 3),
        (torch.arange(90), "regression", 0),
        (torch.rand(90), "regression", 0),
        (torch.rand(90, 2), "regression", 0),
    ],
)
def test_the_task_is_told_from_the_target(values, task, classes):
    _, found, count, why = decide(values, None, "y")
    assert (found, count) == (task, classes)
    assert "y" in why
    assert task in why


def test_text_is_classes():
    features, labels = tiny.arrays()
    data = open_data((features, np.array(["red", "green", "blue"])[labels]))
    assert (data.task, data.classes) == ("classification", 3)


def test_metrics_over_a_whole_part():
    output, target = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 0, 1])
    assert Objective("classification", 2, "accuracy", True).value(output, target, 0.0) == 1.0
    wrong = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    assert Objective("classification", 2, "accuracy", True).value(wrong, target, 0.0) == 0.75
    assert Objective("classification", 2, "balanced-accuracy", True).value(wrong, target, 0.0) == pytest.approx(5 / 6)
    single = Objective("classification", 2, "accuracy", True)
    assert single.value(torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]), target, 0.0) == 0.75
    assert single.of(torch.zeros(4, 1), target).item() == pytest.approx(math.log(2))
    goal = torch.tensor([1.0, 2.0, 3.0])
    assert Objective("regression", 0, "r2", True).value(goal[:, None], goal, 0.0) == 1.0
    assert Objective("regression", 0, "r2", True).value(torch.full((3, 1), 2.0), goal, 0.0) == pytest.approx(0)
    assert Objective("regression", 0, "mae", False).value(goal + 1, goal, 0.0) == pytest.approx(1)
