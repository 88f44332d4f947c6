"""BN301: running statistics that are not those of the data, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm.probes.health import diagnose
from oracles.digits import batches, convnet, mlp, train


def stale(model, data):
    return diagnose(model, data, select=["BN301"])


def lagging(momentum: float, steps: int) -> nn.Module:
    torch.manual_seed(0)
    return train(mlp(lambda channels: nn.BatchNorm1d(channels, momentum=momentum)), steps)


@pytest.mark.parametrize(("momentum", "steps"), [(0.01, 20), (0.01, 100), (0.001, 400)])
def test_an_average_that_lags_is_stale_until_it_is_recalibrated(momentum, steps):
    model, data = lagging(momentum, steps), batches(60, 8)
    found = stale(model, data)
    assert [finding.layer for finding in found] == ["2", "5", "8"]
    assert found.findings[0].numbers["channels"] >= 98
    assert found.findings[0].numbers["median_var_ratio"] > 2
    update_bn(data, model)
    assert not stale(model.eval(), data)


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("size", [32, 128])
def test_a_trained_network_is_not(make, size):
    torch.manual_seed(3)
    model = train(make(), 200, size, seed=3)
    assert not stale(model, batches(size, 4, seed=3))
    assert not stale(model, batches(size, 4, seed=3, held_out=True))
    assert not stale(model, batches(size, 1, seed=3))


def test_moved_data_blame_the_first_layer_alone():
    torch.manual_seed(0)
    model = train(mlp(), 200)
    found = stale(model, [images + 0.5 for images, _ in batches(60, 8)])
    assert [finding.layer for finding in found] == ["2"]
    assert found.findings[0].numbers["largest_mean_gap"] > 1
    assert found.findings[0].numbers["median_var_ratio"] == pytest.approx(1, abs=0.1)


def test_the_numbers_are_exact():
    data = [torch.randn(500, 4) * torch.tensor([1.0, 2.0, 1.0, 1.0]) for _ in range(4)]
    norm = nn.BatchNorm1d(4)
    population = torch.cat(data).double()
    norm.running_mean.copy_(population.mean(0))
    norm.running_var.copy_(population.var(0, correction=0))
    norm.running_mean[1] += 4
    norm.running_var[3] *= 5
    (finding,) = stale(nn.Sequential(norm), data)
    gap = 4 / math.sqrt(float(population[:, 1].var(correction=0)) + 1e-5)
    assert (finding.code, finding.layer, finding.severity) == ("BN301", "0", "warning")
    assert "2 of 4 channels (1, 3)" in finding.message
    assert finding.numbers["largest_mean_gap"] == pytest.approx(gap, rel=1e-5)
    assert finding.numbers["largest_var_ratio"] == pytest.approx(5, rel=1e-3)
    assert finding.numbers["channels"] == 2


@pytest.mark.parametrize(("offset", "factor", "far"), [(0.24, 1.0, 0), (0.27, 1.0, 1), (0.0, 1.46, 0), (0.0, 1.56, 1)])
def test_the_edge_of_the_thresholds(offset, factor, far):
    data = [torch.randn(4000, 8) for _ in range(5)]
    population = torch.cat(data)
    norm = nn.BatchNorm1d(8, momentum=None)
    norm.num_batches_tracked.fill_(1000)
    norm.running_mean.copy_(population.mean(0))
    norm.running_var.copy_(population.var(0))
    norm.running_mean[0] += offset
    norm.running_var[0] *= factor
    assert len(stale(nn.Sequential(norm), data)) == far


def test_a_tenth_of_the_channels_is_needed():
    data = [torch.randn(500, 40) for _ in range(4)]
    norm = nn.BatchNorm1d(40)
    norm.running_mean.copy_(torch.cat(data).mean(0))
    norm.running_mean[:3] += 2
    assert not stale(nn.Sequential(norm), data)
    norm.running_mean[:4] += 2
    assert len(stale(nn.Sequential(norm), data)) == 1


def test_the_same_gap_is_chance_with_few_samples():
    norm = nn.BatchNorm1d(8)
    norm.running_mean.fill_(0.4)
    assert not stale(nn.Sequential(norm), [torch.randn(8, 8), torch.randn(8, 8)])
    assert stale(nn.Sequential(norm), [torch.randn(800, 8), torch.randn(800, 8)])


def test_positions_of_a_sample_are_not_counted_as_samples():
    # Each image has one value: 4096 positions, and the information of 12 samples.
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.fill_(1e-3)
    flat = [torch.randn(6, 8, 1, 1).expand(6, 8, 64, 64) for _ in range(2)]
    norm.running_var.fill_(torch.cat(flat).var(correction=0).item())
    assert torch.cat(flat)[:, :, 0, 0].mean(0).abs().max() > 0.3
    assert not stale(nn.Sequential(norm), flat)


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_that_nothing_moved_are_said_once(count):
    model = nn.Sequential(*[part for _ in range(count) for part in (nn.Linear(6, 6), nn.BatchNorm1d(6))])
    (finding,) = stale(model, [torch.randn(200, 6) for _ in range(3)])
    assert finding.layer == ("" if count > 1 else "1")
    assert f"{count} of {count} batch norms still have mean 0 and variance 1" in finding.message


def test_standard_data_suit_statistics_that_nothing_moved():
    assert not stale(nn.Sequential(nn.BatchNorm1d(6)), [torch.randn(200, 6) for _ in range(3)])


def test_a_frozen_layer_keeps_what_it_was_given():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    for norm in (model[1], model[3]):
        norm.running_mean.fill_(5.0)
    model[1].eval()
    assert [finding.layer for finding in stale(model, [torch.randn(200, 6) for _ in range(3)])] == ["3"]


@pytest.mark.parametrize("mode", [True, False])
def test_layers_that_bn_freeze_froze_are_not_judged(mode):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)).train(mode)
    for norm in (model[1], model[3]):
        norm.running_mean.fill_(5.0)
    bn.freeze(model, "1")
    data = [torch.randn(200, 6) for _ in range(3)]
    assert [finding.layer for finding in stale(model, data)] == ["3"]
    bn.freeze(model)
    assert not diagnose(model, data, select=["BN3"])
    bn.unfreeze(model)
    assert [finding.layer for finding in stale(model, data)] == ["1", "3"]


def test_recalibration_makes_the_statistics_those_of_the_data():
    model, data = lagging(0.01, 20), batches(60, 8)
    for method in ("batch", "sequential"):
        assert not stale(bn.recalibrate(model, data, method=method), data)


def test_nan_in_one_channel_leaves_the_numbers_of_the_others():
    norm = nn.BatchNorm1d(3)
    norm.running_mean.copy_(torch.tensor([float("nan"), 2.0, 0.0]))
    norm.running_var.fill_(9.0)
    found = bn.diagnose(nn.Sequential(norm).eval(), [torch.randn(64, 3) for _ in range(6)], select=["BN301"])
    (finding,) = found
    assert finding.numbers["channels"] == 3
    assert "nan" not in finding.message
    assert 1.5 < finding.numbers["largest_mean_gap"] < 2.5
