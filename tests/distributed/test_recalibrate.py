"""``recalibrate`` on ranks that each have some of the data: all end with the statistics of the whole, bit by bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import distributed, nn

import batchnorm as bn
from distributed.pair import on_both_ranks
from surgery.population_samples import assert_same_state, convolutional, images, norms, state


def mine(rank, sizes):
    """The batches of this rank, and all of them in the order of the ranks."""
    cuts = images(sum(map(sum, sizes))).split([n for own in sizes for n in own])
    here, first = len(sizes[0]), cuts[: len(sizes[0])]
    return (first if rank == 0 else cuts[here:]), cuts


def assert_same_bits(net):
    own = torch.cat([b.double().reshape(-1) for norm in norms(net).values() for b in norm.buffers()])
    both = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(both, own)
    assert torch.equal(both[0], both[1])


def assert_like_one_process(net, whole):
    for name, norm in norms(net).items():
        for key, buffer in norms(whole)[name].named_buffers():
            torch.testing.assert_close(norm.get_buffer(key), buffer, rtol=1e-12, atol=1e-12, msg=f"{name}.{key}")
    assert_same_bits(net)


@pytest.mark.parametrize("method", ["batch", "sequential"])
@pytest.mark.parametrize(
    "sizes", [((20, 20), (20, 20)), ((20, 7), (13, 5, 9, 30)), ((9, 9, 4), ()), ((), (11, 3))], ids=str
)
@on_both_ranks
def test_any_shards(rank, sizes, method):
    net = convolutional().train()
    own, everything = mine(rank, sizes)
    whole = bn.recalibrate(copy.deepcopy(net), everything, method=method, process_group=False)
    bn.recalibrate(net, own, method=method)
    assert_like_one_process(net, whole)
    assert f"the statistics of {len(everything)} batches" in str(bn.changes(net))


@pytest.mark.parametrize("kind", ["sync", "torch", "ddp"])
@on_both_ranks
def test_layers_and_wrappers_that_talk_are_silent(rank, kind):
    """With collectives of their own for each batch they would wait for ever: the ranks have 2 and 4 batches."""
    net = convolutional().train()
    own, everything = mine(rank, ((20, 7), (13, 5, 9, 30)))
    whole = bn.recalibrate(copy.deepcopy(net), everything, process_group=False)
    if kind == "sync":
        net = bn.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    elif kind == "torch":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    else:
        net = nn.parallel.DistributedDataParallel(net)
    bn.recalibrate(net, own)
    assert_like_one_process(net.module if kind == "ddp" else net, whole)


@on_both_ranks
def test_matrices_travel_too(rank):
    net = nn.Sequential(bn.nn.DecorrelatedBatchNorm(6, 3), bn.nn.IterNorm(6, 2)).double()
    x = torch.randn(40, 6, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64)
    whole = bn.recalibrate(copy.deepcopy(net), x.split([15, 15, 10]), process_group=False)
    bn.recalibrate(net, x.split([15, 15, 10])[:2] if rank == 0 else [x[30:]])
    assert_like_one_process(net, whole)


@on_both_ranks
def test_each_rank_stops_by_itself(rank):
    layer = nn.BatchNorm1d(3).double()
    generator = torch.Generator().manual_seed(rank)
    bn.recalibrate(
        layer, (torch.randn(40, 3, generator=generator).double() for _ in range(1000)), until=(0.02, 0.1)[rank]
    )
    assert layer.num_batches_tracked > 40
    assert_same_bits(layer)


@pytest.mark.parametrize("method", ["batch", "sequential"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("what", ["loader", "forward", "nan"])
@on_both_ranks
def test_a_failure_on_one_rank_is_one_on_all_and_changes_none(rank, what, failing, method):
    net, calls = convolutional().train(), []
    before = state(net)

    class Batches:
        def __iter__(self):
            for index, batch in enumerate(images(50).split(10)):
                if rank == failing and index == 3:
                    if what == "loader":
                        raise OSError("disk gone")
                    if what == "nan":
                        batch = batch * torch.nan
                yield batch

    def forward_fn(model, batch):
        calls.append(batch)
        if rank == failing and what == "forward" and len(calls) == 3:
            raise OSError("disk gone")
        return model(batch)

    if rank == failing:
        with pytest.raises((OSError, bn.SurgeryError), match=r"disk gone|'1': expected finite values.* in batch 3"):
            bn.recalibrate(net, Batches(), forward_fn, method=method)
    else:
        text = f"nothing was recalibrated, because rank {failing} failed: (OSError: disk gone|SurgeryError: '1'.*)"
        with pytest.raises(bn.SynchronizationError, match=text):
            bn.recalibrate(net, Batches(), forward_fn, method=method)
    assert_same_state(net, before)
    bn.recalibrate(net, images(20).split(10))  # the ranks are in step
    assert_same_bits(net)


@on_both_ranks
def test_no_batches_at_all(rank):  # noqa: ARG001
    with pytest.raises(bn.InputError, match="expected at least one batch, got none"):
        bn.recalibrate(convolutional(), [])
    with pytest.raises(bn.InputError, match="expected at least one batch, got none"):
        bn.recalibrate(convolutional(), [], method="sequential")


@on_both_ranks
def test_other_models_are_told_apart(rank):
    net = nn.Sequential(nn.BatchNorm1d(3 + rank), nn.BatchNorm1d(3 + rank))
    with pytest.raises(bn.SynchronizationError, match=r"got 0 \(3\), 1 \(3\) on rank 0 and 0 \(4\), 1 \(4\) on rank 1"):
        bn.recalibrate(net, [torch.randn(6, 3 + rank)])


@on_both_ranks
def test_a_rank_alone_and_a_group(rank):
    x = torch.randn(20, 3, dtype=torch.float64) + rank
    layer = nn.BatchNorm1d(3).double()
    if rank == 1:  # the other one does not come
        bn.recalibrate(layer, [x], process_group=False)
        torch.testing.assert_close(layer.running_mean, x.mean(0))
    single = [distributed.new_group([0]), distributed.new_group([1])]
    bn.recalibrate(layer, [x], process_group=single[rank])
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    with pytest.raises(bn.InputError, match="a process group that this process belongs to"):
        bn.recalibrate(layer, [x], process_group=single[1 - rank])
    for group in single:
        if distributed.get_rank(group) >= 0:
            distributed.destroy_process_group(group)


@pytest.mark.parametrize("method", ["batch", "sequential"])
@on_both_ranks
def test_a_layer_that_one_rank_alone_reaches(rank, method):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()

        def forward(self, x):
            return self.b(self.a(x)) if x.mean() > 5 else self.a(x)

    net, x = Routed(), torch.randn(20, 3, dtype=torch.float64) + 10 * rank
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn.recalibrate(net, [x], method=method)
    assert net.b.num_batches_tracked == 1
    assert_same_bits(net)
