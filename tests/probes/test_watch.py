"""What a record says, against NumPy in float64; when looks are made, and which are kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.probes.watching.statistics import LEVELS, SAMPLE
from nn.random_state import randomise
from probes.watched import Twice, inputs, mlp, train

KEYS = [
    *("step", "layer", "type", "mode", "count", "channels", "units", "mean", "std", "levels", "quantiles", "typical"),
    *("output_mean", "output_std", "dead", "saturated", "grad_mean", "grad_std", "grad_norm", "weight", "bias"),
    *("running_mean", "running_var", "mean_gap", "var_ratio"),
]


def one_look(model, x, loss=None, **options):
    """Watch one pass and its backward; the records."""
    with bn.watch(model, every=1, **options) as watch:
        y = model(x)
        if loss is not None:
            loss(y).backward()
    return watch.records


def channels(x):
    """(values, C) in float64."""
    return x.detach().double().movedim(1, -1).reshape(-1, x.shape[1]).numpy()


@pytest.mark.parametrize("shape", [(30, 6), (7, 6, 5), (20, 6, 9, 9), (4, 6, 3, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_the_numbers_of_a_batch_norm(shape, training):
    layer = nn.Sequential(getattr(nn, f"BatchNorm{max(1, len(shape) - 2)}d")(6))
    randomise(layer[0])
    layer.train(training)
    x = (torch.randn(shape) * 3 + 2).requires_grad_()
    factor = torch.randn(shape)
    before = {name: tensor.double().numpy().copy() for name, tensor in layer[0].state_dict().items()}
    (record,) = one_look(layer, x, lambda y: (y * factor).sum(), modes=("train", "eval"))
    assert list(record) == KEYS
    values, count = channels(x), x.numel() // 6
    assert (record["count"], record["channels"], record["units"]) == (count, 6, list(range(6)))
    assert (record["layer"], record["type"], record["step"]) == ("0", type(layer[0]).__name__, 0)
    assert record["mode"] == ("train" if training else "eval")
    np.testing.assert_allclose(record["mean"], values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(record["std"], values.std(0), rtol=1e-12)
    if count <= SAMPLE:
        np.testing.assert_allclose(record["quantiles"], np.percentile(values, LEVELS, axis=0).T, rtol=1e-6)
    for name in ("weight", "bias", "running_mean", "running_var"):
        np.testing.assert_array_equal(record[name], before[name])
    deviation = np.sqrt(before["running_var"] + layer[0].eps)
    np.testing.assert_allclose(record["mean_gap"], (values.mean(0) - before["running_mean"]) / deviation, rtol=1e-9)
    np.testing.assert_allclose(record["var_ratio"], values.var(0, ddof=1) / before["running_var"], rtol=1e-9)
    if training:
        out = (values - values.mean(0)) / np.sqrt(values.var(0) + layer[0].eps)
    else:
        out = (values - before["running_mean"]) / deviation
    out = out * before["weight"] + before["bias"]
    np.testing.assert_allclose(record["output_mean"], out.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(record["output_std"], out.std(0), rtol=1e-4)
    gradient = channels(factor)
    np.testing.assert_allclose(record["grad_mean"], gradient.mean(0), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(record["grad_std"], gradient.std(0), rtol=1e-6)
    np.testing.assert_allclose(record["grad_norm"], np.linalg.norm(gradient, axis=0), rtol=1e-6)


def test_levels_and_the_typical_unit():
    assert {15.0, 50.0, 85.0} <= set(LEVELS)
    x = torch.randn(50, 5)
    (record,) = one_look(nn.Sequential(nn.BatchNorm1d(5)), x)
    at = np.percentile(x.double().numpy(), (15, 50, 85), axis=0)
    np.testing.assert_allclose(record["typical"], np.median(at, axis=1), rtol=1e-6)
    assert record["levels"] == list(LEVELS)


def test_percentiles_of_a_large_batch_are_those_of_a_sample_from_all_of_it():
    """Not of some columns, rows or images: every one has values of its own here."""
    n, height, width = 16, 32, 32
    x = torch.empty(n, 3, height, width)
    x[:, 0] = torch.arange(n).view(-1, 1, 1)
    x[:, 1] = torch.arange(height).view(-1, 1)
    x[:, 2] = torch.arange(width)
    for layout in (torch.contiguous_format, torch.channels_last):
        (record,) = one_look(nn.Sequential(nn.BatchNorm2d(3)), x.to(memory_format=layout))
        expected = np.percentile(channels(x), LEVELS, axis=0).T
        np.testing.assert_allclose(record["quantiles"], expected, atol=1.0)
        np.testing.assert_allclose(record["mean"], channels(x).mean(0), rtol=1e-12)


def test_units_are_spread_and_bounded():
    x = torch.randn(9, 100)
    model = nn.Sequential(nn.BatchNorm1d(100))
    for limit, step in ((64, 2), (100, 1), (None, 1), (30, 4), (1, 100)):
        (record,) = one_look(model, x, units=limit)
        assert record["units"] == list(range(0, 100, step))
        np.testing.assert_allclose(record["mean"], x.double().mean(0)[::step], rtol=1e-12)
        assert len(record["weight"]) == len(record["quantiles"]) == len(record["units"])


def test_large_means_keep_their_digits():
    x = torch.randn(40, 3, 8, 8, dtype=torch.float64) + 1e8
    (record,) = one_look(nn.Sequential(nn.BatchNorm2d(3).double()), x)
    np.testing.assert_allclose(record["std"], channels(x).std(0), rtol=1e-9)


def test_masked_positions_do_not_count():
    x, lengths = torch.randn(4, 3, 10), torch.tensor([10, 7, 3, 1])
    x[1, :, 7:] = 1e6
    with bn.watch(nn.Sequential(layer := bn.nn.BatchNorm1d(3)), every=1, manual=True) as watch:
        watch.begin_step()
        layer(x, lengths=lengths).sum().backward()
        watch.end_step()
    real = np.concatenate([channels(x[i : i + 1, :, :n]) for i, n in enumerate(lengths)])
    record = watch.latest("0")
    assert record["count"] == 21
    np.testing.assert_allclose(record["mean"], real.mean(0), rtol=1e-6)
    np.testing.assert_allclose(record["grad_mean"], np.ones(3))


def test_nested_input():
    rows = [torch.randn(5, 3), torch.randn(2, 3)]
    (record,) = one_look(nn.Sequential(bn.nn.BatchNorm1d(3)), torch.nested.nested_tensor(rows, layout=torch.jagged))
    np.testing.assert_allclose(record["mean"], torch.cat(rows).double().mean(0), rtol=1e-6)


def test_channels_of_linear_layers_are_last():
    model = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    x = torch.randn(3, 5, 4)
    first, norm, last = one_look(model, x, lambda y: y.sum(), layers="?")
    assert [(r["channels"], len(r["output_mean"]), len(r["grad_mean"])) for r in (first, norm, last)] == [
        (4, 7, 7),
        (7, 7, 7),
        (7, 2, 2),
    ]
    assert first["count"] == 15
    np.testing.assert_allclose(first["mean"], x.double().reshape(-1, 4).mean(0), rtol=1e-6, atol=1e-7)
    assert (first["weight"], norm["weight"], norm["running_mean"]) == (None, [1.0] * 7, None)


def test_dead_units():
    x = torch.randn(50, 4)
    x[:, 1] = 3.0  # constant
    bare = nn.BatchNorm1d(4)
    with torch.no_grad():
        bare.bias[1] = -1.0
        bare.bias[2] = -100.0  # never positive
    assert one_look(nn.Sequential(bare), x)[0]["dead"] == 0.25
    for inplace in (False, True):
        records = one_look(nn.Sequential(bare, nn.ReLU(inplace)), x, layers=nn.Module)
        assert [record["dead"] for record in records if record["layer"]] == [0.5, 0.5]
    fused = bn.nn.BatchNorm1d(4, activation="relu")
    fused.load_state_dict(bare.state_dict())
    assert one_look(nn.Sequential(fused), x)[0]["dead"] == 0.5
    (linear,) = one_look(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), x, layers="0")
    assert linear["dead"] is None


@pytest.mark.parametrize(("act", "end"), [(nn.Sigmoid, 4.6), (nn.Tanh, 2.3), (nn.Hardsigmoid, 3), (nn.Hardtanh, 1)])
@pytest.mark.parametrize("rows", [40, 4000])
def test_saturated_values(act, end, rows):
    x = torch.zeros(rows, 4)
    x[: rows // 4, 0] = end
    x[rows // 2 :, 1] = -end
    norm = nn.BatchNorm1d(4, eps=0).eval()
    for _ in range(2):  # the second look knows what follows
        records = one_look(nn.Sequential(norm, act()), x, layers=nn.Module)
        assert [record["saturated"] for record in records if record["layer"]] == pytest.approx([3 / 16] * 2, abs=0.005)


def test_values_that_are_not_finite_are_null():
    x = torch.randn(30, 4)
    x[3, 0], x[5, 1] = torch.nan, torch.inf
    (record,) = one_look(nn.Sequential(nn.BatchNorm1d(4)), x, lambda y: y.sum())
    json.dumps(record, allow_nan=False)
    for name in ("mean", "std", "mean_gap", "var_ratio"):
        assert [value is None for value in record[name]] == [True, True, False, False]
    assert [row.count(None) for row in record["quantiles"]] == [len(LEVELS)] * 2 + [0, 0]
    assert all(value is not None for value in record["typical"])


def test_an_empty_batch():
    (record,) = one_look(nn.Sequential(nn.BatchNorm2d(3)), torch.empty(0, 3, 4, 4), lambda y: y.sum())
    json.dumps(record, allow_nan=False)
    assert (record["count"], record["mean"], record["dead"], record["typical"]) == (0, [None] * 3, None, None)


def test_the_first_call_of_a_pass_counts():
    model = Twice()
    x = inputs(model)
    (record,) = one_look(model, x, lambda y: y.square().sum())
    np.testing.assert_allclose(record["mean"], x.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(record["output_std"], np.ones(4), rtol=1e-4)
    assert record["grad_mean"] is not None


def test_looks_follow_the_steps():
    model = mlp()
    with bn.watch(model, every=3) as watch:
        train(model, inputs(model), steps=8)
        model.eval()(inputs(model))
    assert [r["step"] for r in watch.records if r["layer"] == "1"] == [0, 3, 6]
    assert watch.step == 8
    with bn.watch(model.train(), every=lambda step: step in (1, 4)) as watch:
        train(model, inputs(model), steps=8)
    assert [r["step"] for r in watch.records if r["layer"] == "1"] == [1, 4]


def test_steps_of_accumulated_gradients_are_looked_at_once():
    model = mlp()
    with bn.watch(model, every=2, layers="1", modes=("train", "eval")) as watch:
        for step in range(4):
            for _ in range(3):
                watch.step = step
                model.train()(inputs(model)).sum().backward()
                model.eval()(inputs(model))
    assert [r["step"] for r in watch.records if r["mode"] == "train"] == [0, 2]


def test_modes():
    model, x = mlp(), torch.randn(9, 6)
    with bn.watch(model, every=2, layers="1", modes=("train", "eval")) as watch:
        for _ in range(2):
            model.train()(x)
            for _ in range(4):
                model.eval()(x)
    assert [(r["mode"], r["step"]) for r in watch.records] == [("train", 0), *[("eval", 1)] * 2, *[("eval", 2)] * 2]
    with bn.watch(model, every=2, layers="1", modes=("eval",)) as watch:
        for _ in range(4):
            model.train()(x)
            model.eval()(x)
    assert [(r["mode"], r["step"]) for r in watch.records] == [("eval", 0), ("eval", 2)]


def test_records_stay_spread_over_the_run():
    model, x = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(3, 2)
    with bn.watch(model, every=1, max_records=8) as watch:
        for step in range(100):
            model(x)
            steps = [record["step"] for record in watch.records]
            assert len(steps) <= 8
            assert (steps[0], steps[-1]) == (0, step)
    gaps = np.diff(steps[:-1])
    assert len(steps) >= 5
    assert (gaps == gaps[0]).all()


def test_a_look_is_told_when_its_gradients_are_there():
    model, told = mlp(), []

    def on_look(watch):
        told.append([(r["step"], r["grad_mean"] is not None) for r in watch.records[-2:]])

    with bn.watch(model, every=2, on_look=on_look):
        for step in range(3):
            y = model(inputs(model))
            assert len(told) == (step + 1) // 2
            y.sum().backward()
    assert told == [[(0, True)] * 2, [(2, True)] * 2]
    with bn.watch(model, every=1, on_look=on_look), torch.no_grad():
        model(inputs(model))
        assert told[-1] == [(0, False)] * 2
    with bn.watch(model, every=1, on_look=on_look):
        model(inputs(model))  # no backward pass comes
        assert len(told) == 3
    assert told[-1] == [(0, False)] * 2


def test_two_passes_before_a_backward_pass():
    model = mlp()
    with bn.watch(model, every=2) as watch:
        (model(inputs(model)).sum() + model(inputs(model)).sum()).backward()
    assert watch.latest("1")["grad_mean"] is not None


def test_latest():
    model = mlp()
    with bn.watch(model, every=1) as watch:
        with pytest.raises(bn.InputError, match="expected a look at '1', got none yet: it was not called"):
            watch.latest("1")
        train(model, inputs(model), steps=2)
    assert watch.latest("4")["step"] == 1
    with pytest.raises(bn.InputError, match="expected a watched layer, got '2': one of '1', '4'"):
        watch.latest("2")
