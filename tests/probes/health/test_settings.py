"""Momentum, eps and the dtype of statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import batchnorm as bn


def net(**options):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options))


@pytest.mark.parametrize(
    ("momentum", "severity"), [(0.9, "warning"), (0.99, "warning"), (1.0, "warning"), (1.01, "error"), (-0.1, "error")]
)
def test_a_momentum_that_is_none_or_keras(examine, momentum, severity):
    (found,) = examine(net(momentum=momentum), "BN104")
    assert (found.layer, found.severity, found.numbers) == ("1", severity, {"momentum": momentum})
    assert str(momentum) in found.message


def test_the_remedy_turns_it_round(examine):
    (found,) = examine(net(momentum=0.99), "BN104")
    assert "set momentum to 0.01 " in found.remedy
    assert "Keras" in found.message


def test_nan_is_no_momentum(examine):
    assert [found.severity for found in examine(net(momentum=math.nan), "BN104")] == ["error"]


@pytest.mark.parametrize("momentum", [None, 0.0, 0.0003, 0.01, 0.1, 0.5, 0.89, 0])
def test_a_momentum_that_is_fine(examine, momentum):
    assert not examine(net(momentum=momentum), "BN104")


def test_without_statistics_momentum_means_nothing(examine):
    assert not examine(net(momentum=0.99, track_running_stats=False), "BN104")
    assert not examine(nn.Sequential(bn.nn.FrozenBatchNorm1d(4)), "BN104")
    assert [found.layer for found in examine(nn.Sequential(nn.LazyBatchNorm1d(momentum=0.99)), "BN104")] == ["0"]


@pytest.mark.parametrize(
    ("eps", "dtype", "severity"),
    [
        (0.0, torch.float32, "error"),
        (-1e-5, torch.float32, "error"),
        (9e-11, torch.float32, "warning"),
        (9e-11, torch.bfloat16, "warning"),
        (5.9e-8, torch.float16, "warning"),
        (1e-27, torch.float64, "warning"),
    ],
)
def test_an_eps_that_protects_nothing(examine, eps, dtype, severity):
    (found,) = examine(net(eps=eps).to(dtype), "BN105")
    assert (found.layer, found.severity, found.numbers["eps"]) == ("1", severity, eps)
    assert found.remedy == "set eps to 1e-5"


@pytest.mark.parametrize(
    ("eps", "dtype"),
    [
        *((1e-5, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        (1e-3, torch.float16),
        (1e-10, torch.float32),
        (6e-8, torch.float16),
        (1e-26, torch.float64),
    ],
)
def test_an_eps_that_is_fine(examine, eps, dtype):
    assert not examine(net(eps=eps).to(dtype), "BN105")


def test_eps_is_added_in_float32_even_to_half_precision():
    # What the thresholds rest on: torch loses nothing of 1e-8 for float16, but float16 itself cannot hold it.
    for dtype in (torch.float16, torch.bfloat16):
        norm = nn.BatchNorm1d(1, eps=1e-8).to(dtype).eval()
        norm.running_var.zero_()
        assert norm(torch.full((1, 1), 2.0**-10, dtype=dtype)).item() == pytest.approx(2.0**-10 * 1e4, rel=1e-2)
    assert torch.tensor(2.0**-24, dtype=torch.float16) > 0
    assert torch.tensor(2.9e-8, dtype=torch.float16) == 0


def test_a_constant_layer_may_have_none(examine):
    assert not examine(nn.Sequential(bn.nn.FrozenBatchNorm1d(4, eps=0.0)), "BN105")


@pytest.mark.parametrize(
    ("eps", "said"), [(0.8, "was momentum=0.8 meant"), (0.01, "comes out with 0.99"), (2.0, "0.33")]
)
def test_an_eps_that_may_be_a_momentum(examine, eps, said):
    (found,) = examine(net(eps=eps), "BN109")
    assert (found.layer, found.severity, found.numbers) == ("1", "warning", {"eps": eps})
    assert said in found.message


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 9.9e-3])
def test_an_eps_of_some_other_framework(examine, eps):
    assert not examine(net(eps=eps), "BN109")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_in_half_precision_that_move(examine, dtype):
    (found,) = examine(net().to(dtype), "BN106")
    assert (found.layer, found.severity) == ("1", "warning")
    assert found.numbers == {"dtype": str(dtype)[6:], "relative_step": torch.finfo(dtype).eps}


def test_statistics_in_half_precision_that_are_used(examine):
    model = net().to(torch.bfloat16).eval()
    assert not examine(model, "BN106")
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([1.0, 100.0, -3.0, 0.0]))  # the next number after 100 is 100.5
        model[1].running_var.copy_(torch.tensor([1.0, 24.0, 1.0, 1.0]))
    (found,) = examine(model, "BN106")
    assert found.numbers["channels"] == 1
    assert found.numbers["largest_shift"] == pytest.approx(0.25 / 24.00001**0.5)
    assert "1 of 4 channels (1)" in found.message
    model[1].running_var[1] = 26.0  # a shift of .049
    assert not examine(model, "BN106")


def test_statistics_in_float32_are_fine_with_any_weights(examine):
    model = net().half()
    model[1].float()
    assert not examine(model, "BN106")
    assert not examine(net().double(), "BN106")
