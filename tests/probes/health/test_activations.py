"""BN306, BN307 and BN309: idle units, outliers, and numbers that are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.probes.health import diagnose
from oracles.digits import batches, convnet, mlp, train


def found(code, model, data, **options):
    return list(diagnose(model, data, select=[code], **options))


def settled(norm: nn.Module) -> nn.Module:
    """With statistics that are not those that it was made with, and right for standard normal input."""
    norm.running_mean += 1e-4
    return norm


def normal(features: int = 8, count: int = 3, size: int = 64) -> list[torch.Tensor]:
    return [torch.randn(size, features) for _ in range(count)]


@pytest.mark.parametrize(("dead", "said"), [(1, 0), (2, 1), (8, 1)])
def test_dead_units_before_a_relu(dead, said):
    norm = settled(nn.BatchNorm1d(8))
    with torch.no_grad():
        norm.bias[:dead] = -20
    findings = found("BN306", nn.Sequential(norm, nn.ReLU(), nn.Linear(8, 2)), normal())
    assert len(findings) == said
    if said:
        (finding,) = findings
        assert (finding.layer, finding.severity) == ("0", "warning")
        assert finding.numbers == {"kind": "dead", "channels": dead, "of": 8, "share": dead / 8}
        assert f"{dead} of 8 channels (0, 1" in finding.message
        assert "never positive" in finding.message


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.norm, self.function = settled(nn.BatchNorm1d(8)), function

    def forward(self, x):
        return self.function(self.norm(x))


@pytest.mark.parametrize(
    ("function", "bias", "kind"),
    [
        (torch.relu, -20, "dead"),
        (torch.nn.functional.relu, -20, "dead"),
        (torch.sigmoid, 20, "saturated"),
        (torch.tanh, -20, "saturated"),
        (torch.tanh, 1, None),
        (torch.nn.functional.silu, -20, None),
        (lambda y: y.relu() + y, -20, None),
        (lambda y: (y + 30).relu(), -20, None),
    ],
)
def test_units_are_judged_by_what_follows(function, bias, kind):
    model = Functional(function)
    with torch.no_grad():
        model.norm.bias[:4] = bias
    assert [finding.numbers["kind"] for finding in found("BN306", model, normal())] == ([kind] if kind else [])


def test_a_fused_activation_counts():
    norm = settled(bn.nn.BatchNorm1d(8, activation="relu"))
    with torch.no_grad():
        norm.bias[:4] = -20
    assert [finding.numbers["kind"] for finding in found("BN306", nn.Sequential(norm), normal())] == ["dead"]


def test_constant_inputs_are_collapsed():
    data = [x * torch.tensor([1.0] * 5 + [1e-4] * 2 + [0.0]) for x in normal()]
    (finding,) = found("BN306", nn.Sequential(settled(nn.BatchNorm1d(8))), data)
    assert finding.numbers == {"kind": "collapsed", "channels": 3, "of": 8, "share": 3 / 8}
    assert not found("BN306", nn.Sequential(settled(nn.BatchNorm1d(8, eps=1e-12))), [x * 1e-4 for x in normal()])


def test_few_samples_say_nothing_about_a_unit():
    norm = settled(nn.BatchNorm1d(8))
    with torch.no_grad():
        norm.bias[:4] = -20
    model = nn.Sequential(norm, nn.ReLU())
    assert not found("BN306", model, normal(count=1, size=63))
    assert found("BN306", model, normal(count=1, size=64))


@pytest.mark.parametrize("make", [mlp, convnet, lambda: mlp(activation=nn.Sigmoid), lambda: mlp(activation=nn.Tanh)])
def test_trained_networks_have_few(make):
    torch.manual_seed(0)
    model = train(make(), 200)
    assert not diagnose(model, batches(60, 4), select=["BN306", "BN307", "BN309"])


def test_channels_that_dwarf_the_others():
    norm = settled(nn.BatchNorm1d(16))
    with torch.no_grad():
        norm.weight[3] = 1000
    (finding,) = found("BN307", nn.Sequential(norm), normal(16))
    assert (finding.severity, finding.numbers["channels"]) == ("info", 1)
    assert finding.numbers["ratio"] == pytest.approx(1000, rel=0.5)
    with torch.no_grad():
        norm.weight[3] = 30
    assert not found("BN307", nn.Sequential(norm), normal(16))


def test_inputs_beyond_half_precision():
    norm = settled(nn.BatchNorm1d(4))
    data = [x + torch.tensor([0.0, 0.0, 7e4, 6e4]) for x in normal(4)]
    (finding,) = found("BN307", nn.Sequential(norm), data)
    assert (finding.severity, finding.numbers["channels"]) == ("warning", 1)
    assert "1 of 4 channels (2)" in finding.message


@pytest.mark.parametrize(("value", "said"), [(10.0, 0), (1e4, 1)])
def test_a_single_value_that_makes_the_variance(value, said):
    data = normal(8)
    data[1][5, :4] = value
    assert len(found("BN307", nn.Sequential(settled(nn.BatchNorm1d(8))), data)) == said


class Broken(nn.Module):
    def forward(self, x):
        return x / (x - x)


def test_the_first_layer_that_makes_nan_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Broken(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    (finding,) = found("BN309", model, normal(4))
    assert (finding.layer, finding.severity) == ("2", "error")
    assert "of finite inputs this Broken makes 256 of 256 outputs NaN or infinite, as the first on" in finding.message
    assert finding.numbers == {"batch": 0, "values": 256, "of": 256}


def test_running_statistics_that_are_nan():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].running_var[2] = torch.nan
    (finding,) = found("BN309", model, normal(4))
    assert finding.layer == "1"
    assert "bn.recalibrate" in finding.remedy


def test_overflow_in_half_precision():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half()
    with torch.no_grad():
        model[0].weight.fill_(3e4)
    (finding,) = found("BN309", model, [torch.full((8, 4), 10.0).half()])
    assert (finding.layer, finding.numbers["values"]) == ("0", 32)


def test_nan_in_the_data():
    data = normal(4)
    data[2][7, 1] = torch.nan
    (finding,) = found("BN309", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), data)
    assert finding.layer == ""
    assert finding.message == "1 of 256 values of batch 2 are NaN or infinite"


class Careful(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.norm(x.nan_to_num())
        return y.masked_fill(x.isnan(), -torch.inf)


def test_missing_values_that_the_model_knows_and_masked_scores_are_well():
    data = normal(4)
    data[1][3] = torch.nan
    assert not diagnose(Careful(), data, select=["BN309"])


def test_a_channel_with_nan_is_no_other_finding():
    data = normal(8)
    data[0][0, 0] = torch.nan
    assert diagnose(nn.Sequential(settled(nn.BatchNorm1d(8))), data, select=["BN3"]).codes == {"BN309"}
