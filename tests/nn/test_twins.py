"""A batch norm of another class with the same tensors."""

from __future__ import annotations

import pytest
import torch

import batchnorm as bn
from batchnorm.nn.twins import POLICIES, SETTINGS, twin
from nn.random_state import randomise

OTHERS = {"affine": False, "bias": False, "track_running_stats": False, "momentum": None, "eps": 1e-2}


@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "ours"])
@pytest.mark.parametrize("option", OTHERS)
def test_settings_and_tensors_are_those_of_the_layer(ours, option):
    made = bn.nn.BatchNorm2d if ours else torch.nn.BatchNorm2d
    layer = randomise(made(3, **{option: OTHERS[option]})).eval()
    other = twin(bn.nn.SyncBatchNorm, layer)
    assert [getattr(other, name) for name in SETTINGS] == [getattr(layer, name) for name in SETTINGS]
    assert not other.training
    for kind in ("_parameters", "_buffers"):
        theirs = getattr(layer, kind)
        assert list(getattr(other, kind)) == list(theirs)
        assert all(getattr(other, kind)[name] is theirs[name] for name in theirs)
    other.register_buffer("late", None)
    assert "late" not in layer._buffers


def test_policies_go_along_and_options_come_first():
    policies = {"activation": "relu", "ddof": 0, "on_single_value": "skip", "inference_weight": 0.1}
    layer = bn.nn.BatchNorm1d(3, **policies)
    assert {name: getattr(twin(bn.nn.SyncBatchNorm, layer), name) for name in POLICIES} == policies
    ghost = twin(bn.nn.GhostBatchNorm1d, layer, virtual_batch_size=4, ddof=1)
    assert (ghost.virtual_batch_size, ghost.ddof, ghost.activation) == (4, 1, "relu")
    assert twin(torch.nn.BatchNorm1d, layer).weight is layer.weight
