"""Percentiles and movement against values worked out by hand or by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm import InputError, ShapeError
from batchnorm.probes import PERCENTILES, InputPercentiles, movement, typical_unit


def test_percentiles_of_a_layers_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2))
    x = torch.randn(41, 3)
    plain = model(x)
    with InputPercentiles(model[1]) as probe:
        seen = model(x)
    assert torch.equal(seen, plain)
    inputs = model[0](x).detach().double().numpy()
    np.testing.assert_allclose(
        np.array(probe.look.percentiles), np.percentile(inputs, PERCENTILES, axis=0).T, rtol=1e-12
    )
    np.testing.assert_allclose(probe.look.deviations, inputs.std(0), rtol=1e-12)
    before = probe.look
    model(x + 1)  # after the block nobody looks
    assert probe.look is before
    assert not model[1]._forward_pre_hooks


def test_the_hook_is_gone_after_an_error():
    layer = nn.Sigmoid()
    wanted = r"expected input of shape \(N, units\) with N > 0, got \(0, 3\)"
    with pytest.raises(ShapeError, match=wanted), InputPercentiles(layer):
        layer(torch.zeros(0, 3))
    assert not layer._forward_pre_hooks


def test_refusals():
    with pytest.raises(InputError, match="between 0 and 100"):
        InputPercentiles(nn.Sigmoid(), (15.0, 101.0))
    with pytest.raises(InputError, match="expected a forward pass before looking"):
        _ = InputPercentiles(nn.Sigmoid()).look


def test_the_typical_unit_is_the_median_at_each_level():
    assert typical_unit([(0, 5, 9), (1, 3, 8), (7, 4, 10)]) == (1, 4, 9)


def test_movement():
    before = [(0.0, 1.0, 2.0), (0.0, 2.0, 4.0), (5.0, 5.0, 5.0)]
    after = [(1.0, 2.0, 3.0), (0.0, 2.0, 10.0), (5.0, 5.0, 5.0)]
    assert movement(before, after) == 1.0  # of 1, 2 and 0
    assert movement(before, after, [0.5, 8.0, 0.0]) == 0.25  # of 2, 0.25 and 0
    assert movement(before[:1], after[:1], [0.0]) == float("inf")
    assert movement(before, before, [0.0, 0.0, 0.0]) == 0.0


def test_looks_at_different_layers_are_refused():
    with pytest.raises(InputError, match="two looks at the same units, got 1 and 2"):
        movement([(1.0,)], [(1.0,), (2.0,)])
    with pytest.raises(InputError, match="the same percentiles at both looks, got 1 and 2"):
        movement([(1.0,)], [(1.0, 2.0)])
