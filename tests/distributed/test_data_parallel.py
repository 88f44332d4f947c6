"""Our layers under DistributedDataParallel and FSDP2 (fully_shard), on two gloo processes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn
from distributed.pair import on_both_ranks

LAYERS = ["BatchNorm1d", "SyncBatchNorm"]
layers = pytest.mark.parametrize("layer", LAYERS)


class Net(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        kind = getattr(bn.nn, layer)
        self.first, self.norm = nn.Linear(4, 6, bias=False), kind(6, activation="relu", **options)
        self.middle, self.after = nn.Linear(6, 6, bias=False), kind(6, **options)
        self.last, self.unused = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        h = self.norm(self.first(x))
        return self.last(self.after(self.middle(h), residual=h))


def make(layer, **options):
    torch.manual_seed(3)
    return Net(layer, **options).double()


def batches(count, rows=6):
    return torch.randn(count, rows, 4, dtype=torch.float64)


def part(batch, rank):
    return batch[:2] if rank == 0 else batch[2:]


def by_hand(model, batch, rank, layer):
    """What DDP ought to give: the average over ranks of the gradients of each rank's sum, computed in one process.

    A plain layer normalizes each rank's part by itself; a synchronised one is one process with the whole batch.
    """
    if layer == "SyncBatchNorm":
        twin = make("BatchNorm1d")
        twin.load_state_dict(model.state_dict())
        y = twin(batch)
        y.pow(2).sum().backward()
        gradients = {name: p.grad / 2 for name, p in twin.named_parameters() if p.grad is not None}
        return part(y, rank), gradients, twin
    twins, outputs = [], []
    for each in range(2):
        twin = make(layer)
        twin.load_state_dict(model.state_dict())
        outputs.append(twin(part(batch, each)))
        outputs[-1].pow(2).sum().backward()
        twins.append(dict(twin.named_parameters()))
    gradients = {name: (p.grad + twins[1][name].grad) / 2 for name, p in twins[0].items() if p.grad is not None}
    return outputs[rank], gradients, None


def assert_gradients(model, expected):
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        else:
            assert parameter.grad is None or parameter.grad.abs().sum() == 0


@pytest.mark.parametrize("broadcast", [True, False], ids=["broadcast_buffers", "no broadcast"])
@layers
@on_both_ranks
def test_ddp_steps(rank, layer, broadcast):
    model = make(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls the option forward_sync_buffers
        parallel = DistributedDataParallel(model, broadcast_buffers=broadcast, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    for batch in batches(4):
        expected_y, gradients, twin = by_hand(model, batch, rank, layer)
        optimizer.zero_grad()
        y = parallel(part(batch, rank))
        y.pow(2).sum().backward()
        torch.testing.assert_close(y, expected_y)
        assert_gradients(model, gradients)
        if twin is not None:
            torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
        optimizer.step()
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(theirs, mine)
    assert torch.equal(*theirs)


@layers
@on_both_ranks
def test_ddp_accumulates_without_sync(rank, layer):
    """no_sync() leaves out DDP's averaging, never the statistics'."""
    model = make(layer)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    first, second = batches(2)
    source = make(layer)
    _, one, twin = by_hand(source, first, rank, layer)
    if twin is not None:
        source.load_state_dict(twin.state_dict())
    _, two, _ = by_hand(source, second, rank, layer)
    with parallel.no_sync():
        parallel(part(first, rank)).pow(2).sum().backward()
    parallel(part(second, rank)).pow(2).sum().backward()
    assert_gradients(model, {name: one[name] + two[name] for name in one})


@layers
@on_both_ranks
def test_ddp_two_forwards_before_one_backward(rank, layer):
    """pytorch #175024, #110363, #65907: buffers that DDP broadcasts and the layer moves, in place, in between."""
    model = make(layer)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    first, second = batches(2)
    source = make(layer)
    _, one, _ = by_hand(source, first, rank, layer)
    _, two, _ = by_hand(source, second, rank, layer)
    loss = parallel(part(first, rank)).pow(2).sum() + parallel(part(second, rank)).pow(2).sum()
    loss.backward()
    assert_gradients(model, {name: one[name] + two[name] for name in one})


@pytest.mark.parametrize("low", [False, True], ids=["float64", "bfloat16 compute"])
@layers
@on_both_ranks
def test_fsdp2(rank, layer, low):
    source, mesh = make(layer), init_device_mesh("cpu", (2,))
    model = copy.deepcopy(source)
    del model.unused
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if low else None
    options = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    if low:
        model = model.float()
    for child in (model.norm, model.after, model):
        fully_shard(child, **options)
    assert isinstance(model.norm.weight, distributed.tensor.DTensor)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step, batch in enumerate(batches(3)):
        optimizer.zero_grad()
        y = model(part(batch.float() if low else batch, rank))
        y.pow(2).sum().backward()
        assert y.dtype == (torch.bfloat16 if low else torch.float64)
        if step == 0 and not low:
            expected_y, gradients, twin = by_hand(source, batch, rank, layer)
            torch.testing.assert_close(y, expected_y)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
            if twin is not None:
                torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
        optimizer.step()
    assert model.norm.num_batches_tracked == 3
    state = model.state_dict()
    assert state["norm.weight"].full_tensor().isfinite().all()
    assert not isinstance(state["norm.running_mean"], distributed.tensor.DTensor)
