"""Every layer of the conformance battery takes steps under DistributedDataParallel and FSDP2, on two gloo processes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from conformance.cases import CASES
from conformance.test_layers import made
from distributed.pair import on_both_ranks

every_layer = pytest.mark.parametrize("name", sorted(CASES.keys() - {"SyncBatchNorm"}))  # has its own tests


class Scaled(torch.nn.Module):
    """A layer after a parameter: some layers have none of their own, and there would be nothing to share."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.scale, self.layer = torch.nn.Parameter(torch.tensor([1.5])), layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale)


def setup(name: str) -> tuple[Scaled, list[list[torch.Tensor]]]:
    """The same model on both ranks, and two steps' inputs of each rank."""
    torch.manual_seed(3)
    return Scaled(made(CASES[name], True)).double(), [
        [torch.randn(CASES[name].shape).double() for _ in range(2)] for _ in range(2)
    ]


def averaged(model: Scaled, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The average over ranks of the gradients, and each rank's buffers after the step, found in one process."""
    gradients, buffers = [], []
    for x in inputs:
        twin = copy.deepcopy(model)
        twin.zero_grad()
        twin(x).pow(2).sum().backward()
        gradients.append([p.grad for p in twin.parameters()])
        buffers.append(dict(twin.named_buffers()))
    return [(first + second) / 2 for first, second in zip(*gradients, strict=True)], buffers


@every_layer
@on_both_ranks
def test_ddp(rank, name):
    model, steps = setup(name)
    source = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls the option forward_sync_buffers
        parallel = DistributedDataParallel(model, broadcast_buffers=True)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.01)
    for step, inputs in enumerate(steps):
        optimizer.zero_grad()
        parallel(inputs[rank]).pow(2).sum().backward()
        if step == 0:
            gradients, buffers = averaged(source, inputs)
            torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
            torch.testing.assert_close(dict(model.named_buffers()), buffers[rank])
        optimizer.step()
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(theirs, mine)
    assert torch.equal(*theirs)


@every_layer
@on_both_ranks
def test_fsdp2(rank, name):
    model, steps = setup(name)
    source = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step, inputs in enumerate(steps):
        optimizer.zero_grad()
        model(inputs[rank]).pow(2).sum().backward()
        if step == 0:
            gradients, buffers = averaged(source, inputs)
            torch.testing.assert_close([p.grad.full_tensor() for p in model.parameters()], gradients)
            torch.testing.assert_close(dict(model.named_buffers()), buffers[rank])
        optimizer.step()
    assert all(parameter.full_tensor().isfinite().all() for parameter in model.parameters())
