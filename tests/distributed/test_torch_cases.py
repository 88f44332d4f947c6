"""The nine cases in which torch tests its SyncBatchNorm (``torch/testing/_internal/distributed/distributed_test.py``).

The same cases with our layer, on two gloo processes and the CPU, where torch's does not run: a model under
DistributedDataParallel, each rank with its part of the batch, has after every step the parameters that one process with
the whole batch has.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from distributed.pair import on_both_ranks

STEPS = 5


class Net(nn.Module):
    """Linear, a batch norm over pairs of rows of what it gives, linear, softmax: the model of torch's cases."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(2, 40, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=affine)
        self.last = nn.Linear(40, 4, bias=False)

    def forward(self, x):
        x = self.norm(self.first(x).reshape(-1, 4, 10))
        return self.last(x.reshape(-1, 40)).softmax(dim=1)


def converted(model):
    return bn.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))


def stored_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def one_step(model, x, target, scale=1.0):
    """Towards a greater loss, as torch's cases go: nothing settles."""
    y = model(x)
    (nn.functional.mse_loss(y, target) * scale).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter += parameter.grad
                parameter.grad.zero_()
    return y


def train_beside(one, parallel, x, target, mine, steps=STEPS):
    """Trains ``one`` with the whole batch and ``parallel`` with this rank's part, and compares after each step."""
    # DDP averages the ranks' gradients of means over parts; this makes of them the gradient of the mean over all.
    scale = 2 * len(x[mine]) / len(x)
    outputs = []
    for step in range(steps):
        one_step(one, x, target)
        outputs.append(one_step(parallel, x[mine], target[mine], scale))
        for ours, expected in zip(parallel.module.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(ours, expected)
        x = x[torch.randperm(len(x))]
        if step == 2:
            parallel = stored_and_loaded(parallel)
    torch.testing.assert_close(stored_and_loaded(parallel).state_dict(), parallel.state_dict(), rtol=0, atol=0)
    return outputs


def part(rank, sizes):
    return slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))


def train_net(rank, sizes, affine=True):
    model = Net(affine)
    parallel = stored_and_loaded(DistributedDataParallel(converted(model)))
    x, target = torch.randn(sum(sizes), 2), torch.randn(sum(sizes), 4)
    train_beside(model, parallel, x, target, part(rank, sizes), STEPS if affine else 2)


@on_both_ranks
def test_ddp(rank):
    train_net(rank, (2, 2))


@on_both_ranks
def test_ddp_no_affine(rank):
    train_net(rank, (2, 2), affine=False)


@on_both_ranks
def test_ddp_different_input_sizes_gradient(rank):
    train_net(rank, (2, 3))


@pytest.mark.parametrize("each", [2, 1], ids=["2-D input", "single input per process"])
@on_both_ranks
def test_ddp_rows(rank, each):
    model = nn.BatchNorm1d(2)
    x, target = torch.randn(2 * each, 2), torch.randn(2 * each, 2)
    train_beside(model, DistributedDataParallel(converted(model)), x, target, part(rank, (each, each)))


@pytest.mark.parametrize("dimensions", [2, 3])
@on_both_ranks
def test_ddp_channels_last(rank, dimensions):
    memory_format = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    layer = bn.nn.SyncBatchNorm(2, momentum=0.99)
    one = bn.nn.BatchNorm2d(2, momentum=0.99) if dimensions == 2 else bn.nn.BatchNorm3d(2, momentum=0.99)
    x, target = (torch.randn(4, 2, *[4] * dimensions).to(memory_format=memory_format) for _ in range(2))
    for y in train_beside(one, DistributedDataParallel(layer), x, target, part(rank, (2, 2))):
        assert y.is_contiguous(memory_format=memory_format)


@on_both_ranks
def test_ddp_different_input_sizes_running_value(rank):
    """After many steps of one batch the running values are its mean and unbiased variance, over both ranks' sizes."""
    model = DistributedDataParallel(bn.nn.SyncBatchNorm(2, momentum=0.99))
    parts = [
        torch.cat([torch.full((2, 1, 10 ** (i + 1)), base ** (i - 1)) for base in (0.1, 0.3)], dim=1) for i in range(2)
    ]
    for _ in range(100):
        model(parts[rank]).mean().backward()
    values = torch.cat([values.transpose(0, 1).reshape(2, -1) for values in parts], dim=1)
    torch.testing.assert_close(model.module.running_mean, values.mean(1))
    torch.testing.assert_close(model.module.running_var, values.var(1))


@on_both_ranks
def test_ddp_half(rank):
    model = DistributedDataParallel(converted(Net().half()))
    y = model(torch.randn(2 + rank, 2).half())
    assert y.dtype == torch.float16
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float16}


@on_both_ranks
def test_conversion_passes_the_process_group_on(rank):
    group = distributed.new_group([0])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))))
    model = bn.nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    found = [layer.process_group for layer in model.modules() if isinstance(layer, bn.nn.SyncBatchNorm)]
    assert len(found) == 2
    assert all(each is group for each in found)
    if rank == 0:
        assert group.size() == 1
