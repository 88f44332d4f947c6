"""In torch.inference_mode, where models in use are handled: what is made of one there has ordinary tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import batchnorm as bn


def network():
    """It overwrites its input, which may be a tensor of inference mode."""
    return nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    )


def ordinary(model):
    """It trains, and a state can be loaded into it."""
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    model.train()(torch.randn(6, 8)).sum().backward()
    model.load_state_dict(model.state_dict())
    return True


@pytest.fixture(params=["made there", "made before"])
def x(request):
    with torch.inference_mode(request.param == "made there"):
        return torch.randn(20, 8)


def test_fold(x):
    model = network().eval()
    with torch.inference_mode():
        folded = bn.fold(model, x)
        assert str(bn.changes(folded)) == "2: BatchNorm1d folded into 1 (Linear)"
        torch.testing.assert_close(folded(x + 0), model(x + 0))
    assert ordinary(folded)
    assert ordinary(model)
    with torch.no_grad():
        bn.fold(model.eval(), x)


def test_insert(x):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with torch.inference_mode():
        bn.insert(model, x, preserve=True)
    assert ordinary(model)


@pytest.mark.parametrize("to", ["ours", "sync", "frozen", "renorm", "group"])
def test_convert_and_revert(to):
    model = network()
    with torch.inference_mode():
        bn.convert(model, to)
    assert ordinary(model)
    with torch.inference_mode():
        bn.revert(model)
    assert ordinary(model)
    assert type(model[2]) is nn.BatchNorm1d


def test_diagnose():
    model = network()
    batches = list(torch.randn(60, 8).split(20))
    expected = bn.diagnose(model, batches).codes
    with torch.inference_mode():
        assert bn.diagnose(model, [batch + 0 for batch in batches]).codes == expected
    assert ordinary(model)


def test_models_that_were_made_there_are_refused_by_what_they_are():
    with torch.inference_mode():
        model = network().eval()
    with pytest.raises(bn.SurgeryError, match=r"got 1.weight made in it: make it anew"):
        bn.fold(model, torch.randn(6, 8))
    with pytest.raises(bn.SurgeryError, match="'2': expected a layer made outside of inference mode"):
        bn.recalibrate(model, [torch.randn(6, 8)])
    with torch.inference_mode():
        bn.recalibrate(model, [torch.randn(6, 8)])
    assert bn.diagnose(model, example=torch.randn(6, 8)).layers == 1


def test_what_is_pruned_is_left_with_what_makes_it_whole():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model(torch.randn(6, 8))  # with a gradient the weight that is made has a history, and cannot be copied
    assert "made anew at each call: first torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune" in str(
        bn.changes(bn.fold(model, torch.randn(6, 8)))
    )
    prune.remove(model[0], "weight")
    assert str(bn.changes(bn.fold(model, torch.randn(6, 8)))) == "1: BatchNorm1d folded into 0 (Linear)"
