"""A layer's tensors are found where they are: parametrized ones, and those of a functional call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrize

import batchnorm as bn


class Doubled(torch.nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrized_parameter(name, training):
    layer = bn.nn.BatchNorm1d(3).train(training)
    with torch.no_grad():
        getattr(layer, name).copy_(torch.tensor([1.0, 2.0, 3.0]))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(twin, name).mul_(2)
    parametrize.register_parametrization(layer, name, Doubled())
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), twin(x))


def test_a_parametrized_buffer_in_eval():
    layer = bn.nn.BatchNorm1d(3).eval()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    twin = copy.deepcopy(layer)
    twin.running_mean.mul_(2)
    parametrize.register_parametrization(layer, "running_mean", Doubled())
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), twin(x))


def test_a_functional_call_moves_the_buffers_it_was_given():
    layer = bn.nn.BatchNorm1d(3)
    given = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(6, 3)
    torch.func.functional_call(layer, given, (x,))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(given["running_mean"], 0.1 * x.mean(0))
    assert given["num_batches_tracked"] == 1
