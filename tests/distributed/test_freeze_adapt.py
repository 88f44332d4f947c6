"""Two gloo processes: what is frozen exchanges nothing, and each process adapts by itself."""

from __future__ import annotations

import copy

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from distributed.pair import on_both_ranks


def network() -> torch.nn.Sequential:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), bn.nn.SyncBatchNorm(4), torch.nn.Linear(4, 2))
    model(torch.randn(8, 3))
    return model


@on_both_ranks
def test_a_frozen_layer_waits_for_nobody(rank):
    model = network()
    plain = copy.deepcopy(model).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bn.freeze(model)
    torch.manual_seed(rank)
    model.train()
    for _ in range(1 + 2 * rank):  # another number of times on each rank
        x = torch.randn(5 + rank, 3)
        y = model(x)
        torch.testing.assert_close(y, plain(x))
        y.square().sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@on_both_ranks
def test_a_frozen_layer_inside_distributed_data_parallel(rank):
    model = DistributedDataParallel(bn.freeze(network())).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    norm = copy.deepcopy(model.module[1])
    torch.manual_seed(rank)
    for _ in range(3):
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in model.module[1].state_dict().items():
        assert torch.equal(value, norm.state_dict()[key])
    mine = model.module[0].weight.detach()
    both = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(both, mine)
    assert torch.equal(both[0], both[1])


@on_both_ranks
def test_each_process_adapts_by_itself(rank):
    model = network().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [torch.randn(6, 3) + rank for _ in range(2 + rank)]
    bn.adapt(model, batches, prior=4).reset()
    adapted = bn.adapt(model, batches)
    torch.testing.assert_close(model[1].running_mean, model[0](torch.cat(batches)).mean(0))
    adapted.reset()
    adapted = bn.adapt(model)
    for batch in batches:
        adapted(batch)
    torch.testing.assert_close(model[1].running_mean, model[0](torch.cat(batches)).mean(0))
    adapted.reset()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
