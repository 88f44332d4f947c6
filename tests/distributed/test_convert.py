"""Converted layers over two processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn

import batchnorm as bn
from distributed.pair import on_both_ranks


@on_both_ranks
def test_two_processes_compute_what_one_does_with_the_whole_batch(rank):
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(27)).double()
    x = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    model = bn.convert(copy.deepcopy(one), "sync")
    parallel = nn.parallel.DistributedDataParallel(model)
    expected = one(x)
    y = parallel(x[4 * rank : 4 * rank + 4])
    torch.testing.assert_close(y, expected[4 * rank : 4 * rank + 4])
    (y.square() * torch.arange(4.0).view(-1, 1)).mean().backward()
    (expected.square() * torch.arange(4.0).repeat(2).view(-1, 1)).mean().backward()
    for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    bn.revert(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in one]
    for key, tensor in one.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor)


@on_both_ranks
def test_a_process_group_survives_the_way_there_and_back_and_copies(rank):
    torch.manual_seed(rank)
    group = distributed.new_group([0, 1])
    layers = nn.Sequential(bn.nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3, process_group=group))
    model = bn.convert(layers, "frozen")
    copied = bn.revert(copy.deepcopy(model))
    bn.revert(model)
    for back in (model, copied):
        assert [type(layer) for layer in back] == [bn.nn.SyncBatchNorm, nn.SyncBatchNorm]
        assert all(layer.process_group is group for layer in back)
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(3)), "sync", process_group=group)
    assert copy.deepcopy(model)[0].process_group is group


@on_both_ranks
def test_inside_ddp_it_is_too_late(rank):
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(
        bn.SurgeryError, match=r"got DistributedDataParallel at the root, .* convert the model, then wrap"
    ):
        bn.convert(model, "sync")
