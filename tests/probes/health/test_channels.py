"""Variances and gammas of single channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn


def net(channels=8, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, channels), nn.BatchNorm1d(channels, **options))
    model(torch.randn(64, 3))
    return model


def with_values(name, where, value, **options):
    model = net(**options)
    with torch.no_grad():
        getattr(model[1], name)[where] = value
    return model


# BN202


def test_a_negative_variance_is_an_error(examine):
    (found,) = examine(with_values("running_var", [0, 5], -0.25), "BN202")
    assert (found.layer, found.severity, found.numbers) == ("1", "error", {"channels": 2, "least": -0.25})
    assert found.message == "running_var is negative in 2 of 8 channels (0, 5), down to -0.25"


def test_channels_without_variance(examine):
    (found,) = examine(with_values("running_var", [0, 5, 7], 0.0), "BN202")
    assert (found.severity, found.numbers["channels"]) == ("info", 3)
    assert found.message == "running_var is 0.0 in 3 of 8 channels (0, 5, 7), beside eps 1e-05: constant outputs"


@pytest.mark.parametrize(("channels", "severity"), [(3, "info"), (4, "warning")])
def test_half_a_layer_is_a_warning(examine, channels, severity):
    found = examine(with_values("running_var", list(range(channels)), 0.0), "BN202")
    assert [finding.severity for finding in found] == [severity]


@pytest.mark.parametrize(("value", "found"), [(0.99e-8, True), (1.01e-8, False), (1e-6, False)])
def test_a_thousandth_of_eps_is_the_edge(examine, value, found):
    assert bool(examine(with_values("running_var", 3, value), "BN202")) is found


def test_what_eps_does_not_hold_back_is_a_warning(examine):
    model = with_values("running_var", 3, 0.0, eps=1e-9)
    (found,) = examine(model, "BN202")
    assert found.severity == "warning"
    assert found.numbers["gain"] == pytest.approx(1e-9**-0.5, rel=1e-3)
    with torch.no_grad():
        model[1].weight[3] = 1e-3
    assert [finding.severity for finding in examine(model, "BN202")] == ["info"]


def test_variances_below_a_large_eps_are_ordinary(examine):
    assert not examine(with_values("running_var", [0, 1, 2, 3, 4], 5e-4, eps=1e-3), "BN202")
    assert not examine(nn.Sequential(nn.BatchNorm1d(4)), "BN202")


def test_a_frozen_layer_is_looked_at(examine):
    frozen = bn.nn.FrozenBatchNorm1d(4)
    frozen.running_var[1] = -1.0
    assert [finding.severity for finding in examine(nn.Sequential(frozen), "BN202")] == ["error"]


# BN203


@pytest.mark.parametrize(("value", "found"), [(1.01e8, True), (0.99e8, False)])
def test_a_variance_beyond_float16(examine, value, found):
    signs = examine(with_values("running_var", 2, value), "BN203")
    assert bool(signs) is found
    if found:
        assert (signs[0].layer, signs[0].severity, signs[0].numbers["channels"]) == ("1", "warning", 1)
        assert "in 1 of 8 channels (2): deviations of 1e+04" in signs[0].message


@pytest.mark.parametrize(("value", "found"), [(33000.0, True), (32000.0, False)])
def test_float16_statistics_overflow_earlier(examine, value, found):
    model = with_values("running_var", 2, value).half()
    signs = examine(model, "BN203")
    assert [sign.numbers["limit"] for sign in signs] == ([32752.0] if found else [])


def test_float64_has_room_and_infinity_is_another_rule(examine):
    assert not examine(with_values("running_var", 2, 1e12).double(), "BN203")
    model = with_values("running_var", 2, float("inf"))
    assert {finding.code for finding in examine(model, "BN2")} == {"BN204"}


# BN205


def test_single_dead_gammas(examine):
    (found,) = examine(with_values("weight", [1, 6], 1e-8), "BN205")
    assert (found.layer, found.severity) == ("1", "info")
    assert found.numbers == {"channels": 2, "largest": pytest.approx(1e-8), "median": 1.0}
    assert found.message == "gamma is at most 1e-08 in 2 of 8 channels (1, 6), beside a median of 1: constant outputs"


@pytest.mark.parametrize(("value", "found"), [(0.99e-6, True), (1.01e-6, False), (-1.0, False), (-0.9e-6, True)])
def test_a_millionth_of_the_median_is_the_edge(examine, value, found):
    assert bool(examine(with_values("weight", 1, value), "BN205")) is found


def test_exact_zeros_do_not_move_the_median(examine):
    (found,) = examine(with_values("weight", [0, 1, 2, 3, 4], 0.0), "BN205")
    assert found.numbers == {"channels": 5, "largest": 0.0, "median": 1.0}
    assert "gamma is 0.0 in 5 of 8 channels" in found.message


def test_a_branch_that_starts_at_zero_is_intended(examine):
    model = with_values("weight", slice(None), 0.0)
    assert not examine(model, "BN205")
    with torch.no_grad():
        model[1].bias.copy_(torch.randn(8))  # the model has learned, gamma has not
    (found,) = examine(model, "BN205")
    assert (found.severity, found.numbers) == ("warning", {"channels": 8, "largest": 0.0, "median": 0.0})


def test_a_new_layer_is_left_alone(examine):
    model = with_values("weight", [1, 6], 0.0)
    model[1].reset_running_stats()
    assert not examine(model, "BN205")
