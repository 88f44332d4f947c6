"""The doctor in several processes."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from distributed.pair import on_both_ranks


@on_both_ranks
def test_layers_that_are_not_synchronised(rank):
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)))
    (found,) = bn.diagnose(model).of("BN108")
    assert (found.layer, found.severity, found.numbers) == ("", "info", {"world_size": 2, "layers": 1})
    (found,) = bn.diagnose(model, [torch.randn(4 + rank, 3)], select=["BN108"])
    assert (found.severity, found.numbers["batch"]) == ("warning", 4 + rank)
    (found,) = bn.diagnose(model.module, select=["BN108"])  # before it is wrapped
    assert found.severity == "info"
    assert not bn.diagnose(model.eval(), select=["BN108"])


@on_both_ranks
def test_a_group_of_one_shares_with_nobody(rank):
    groups = [distributed.new_group([each]) for each in range(2)]
    alone = nn.Sequential(nn.Linear(3, 4), bn.nn.SyncBatchNorm(4, process_group=groups[rank]))
    (found,) = bn.diagnose(alone, select=["BN108"])
    assert (found.layer, found.severity, found.numbers) == ("1", "warning", {"world_size": 2, "group_size": 1})
    own = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), process_group=groups[rank])
    assert not bn.diagnose(own, select=["BN108"])  # its batch is this process's alone
    assert not bn.diagnose(nn.Sequential(nn.Linear(3, 4), bn.nn.SyncBatchNorm(4)), select=["BN108"])
