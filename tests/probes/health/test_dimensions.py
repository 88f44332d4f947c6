"""Channels in another dimension than 1, and examples that fail in a batch norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn


class Between(nn.Module):
    """A layer, something that moves dimensions, a batch norm."""

    def __init__(self, layer, move, norm):
        super().__init__()
        self.layer, self.move, self.norm = layer, move, norm

    def forward(self, x):
        return self.norm(self.move(self.layer(x)))


LINEAR, CONV = nn.Linear(3, 8), nn.Conv2d(3, 8, 1)


@pytest.mark.parametrize(
    ("layer", "move", "norm", "shape", "dimension"),
    [
        (LINEAR, lambda x: x, nn.BatchNorm1d(8), (4, 8, 3), 2),
        (LINEAR, lambda x: torch.relu(x) + 1, nn.BatchNorm1d(8), (4, 8, 3), 2),
        (nn.Sequential(LINEAR, nn.LayerNorm(8), nn.GELU(), nn.Dropout()), lambda x: x, nn.BatchNorm1d(8), (4, 8, 3), 2),
        (CONV, lambda x: x.permute(0, 2, 3, 1), nn.BatchNorm2d(8), (2, 3, 8, 8), 3),
        (CONV, lambda x: x.permute((0, 2, 3, 1)).contiguous(), nn.BatchNorm2d(8), (2, 3, 8, 8), 3),
        (CONV, lambda x: x.movedim(1, -1), nn.BatchNorm2d(8), (2, 3, 8, 8), 3),
        (CONV, lambda x: torch.transpose(x, 1, 2), nn.BatchNorm2d(8), (2, 3, 8, 8), 2),
        (CONV, lambda x: x.flatten(2).transpose(1, 2), nn.BatchNorm1d(8), (2, 3, 2, 4), 2),
    ],
)
def test_channels_elsewhere_by_chance(examine, layer, move, norm, shape, dimension):
    (found,) = examine(Between(layer, move, norm), "BN005", example=torch.randn(shape))
    assert (found.layer, found.severity) == ("norm", "error")
    assert (found.numbers["dimension"], found.numbers["channels"]) == (dimension, 8)
    assert found.remedy == f"bring the channels to dimension 1 before it: x.movedim({dimension}, 1)"


def test_positions_that_are_declared(examine):
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(5))
    (found,) = examine(model, "BN005", example=torch.randn(4, 5, 3))
    assert found.severity == "warning"
    assert found.message == (
        "the 8 channels of 0 are in dimension 2 of (4, 5, 8); dimension 1 is normalized, as num_features=5 declares"
    )


@pytest.mark.parametrize(
    ("layer", "move", "norm", "shape"),
    [
        (LINEAR, lambda x: x, nn.BatchNorm1d(8), (4, 3)),
        (LINEAR, lambda x: x.transpose(1, 2), nn.BatchNorm1d(8), (4, 8, 3)),
        (LINEAR, lambda x: x.mT.contiguous(), nn.BatchNorm1d(8), (4, 8, 3)),
        (LINEAR, lambda x: x.flatten(0, 1), nn.BatchNorm1d(8), (4, 8, 3)),
        (LINEAR, lambda x: x.reshape(-1, 8), nn.BatchNorm1d(8), (4, 8, 3)),
        (LINEAR, lambda x: x.permute(0, 2, 1), nn.BatchNorm1d(8), (4, 8, 3)),
        (CONV, lambda x: x, nn.BatchNorm2d(8), (2, 3, 8, 8)),
        (CONV, lambda x: x.flatten(2), nn.BatchNorm1d(8), (2, 3, 8, 8)),
        (CONV, lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), nn.BatchNorm2d(8), (2, 3, 8, 8)),
        (CONV, lambda x: x.to(memory_format=torch.channels_last), nn.BatchNorm2d(8), (2, 3, 8, 8)),
        (CONV, lambda x: x.unfold(1, 8, 8).sum(-1).expand(2, 8, 8, 8), nn.BatchNorm2d(8), (2, 3, 8, 8)),  # not followed
    ],
)
def test_channels_in_their_place(examine, layer, move, norm, shape):
    model = Between(layer, move, norm)
    assert not examine(model, "BN005", example=torch.randn(shape))
    assert not examine(model, "BN005")  # shapes are known of a run only


def test_an_example_that_fails_is_a_finding(examine):
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    (found,) = examine(model, "BN005", example=torch.randn(4, 7, 3))
    assert (found.layer, found.severity) == ("1", "error")
    assert found.message == "the example fails here: got (4, 7, 8), expected 8 channels in dimension 1"
    assert found.remedy.endswith("x.movedim(2, 1)")
    assert found.numbers == {"num_features": 8, "shape": [4, 7, 8]}


def test_a_wrong_rank_says_so(examine):
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm2d(8))
    (found,) = examine(model, "BN005", example=torch.randn(4, 3, 5))
    assert found.message == "the example fails here: got (4, 8, 5): expected 4D input (got 3D input)"


def test_what_needs_data_is_skipped_after_a_failure():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), bn.nn.BatchNorm1d(9))
    diagnosis = bn.diagnose(model, [torch.randn(4, 3)])
    assert [found.layer for found in diagnosis.of("BN005")] == ["2"]
    assert set(diagnosis.skipped.values()) <= {"needs a batch that gets through 2", "needs optimizer"}
    assert "BN001" in diagnosis.checked  # what torch.fx reads is looked at all the same


def test_an_example_that_fails_elsewhere_is_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bn.diagnose(model, example=torch.randn(5, 3))
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d(5), (5,)), (nn.BatchNorm2d(5), (5, 4, 4))])
def test_an_example_without_the_dimension_of_samples(norm, shape):
    (finding,) = bn.diagnose(nn.Sequential(norm), example=torch.randn(shape), select=["BN005"])
    assert finding.remedy.startswith("the dimension of samples is missing: give a batch (N, C, ...)")
