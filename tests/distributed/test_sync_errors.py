"""Ranks that disagree, leave out a layer, or die: an error that says so, on every rank, and soon."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import time

import pytest
import torch
from torch import distributed

import batchnorm as bn
from distributed.pair import on_both_ranks

SOON = dt.timedelta(seconds=2)


@pytest.mark.parametrize("earlier", [False, True], ids=["at first", "after a layer of both widths"])
@on_both_ranks
def test_another_number_of_channels(rank, earlier):
    group = distributed.new_group([0, 1])
    if earlier:
        for channels in (3, 4):
            bn.nn.SyncBatchNorm(channels, process_group=group)(torch.randn(5, channels))
    layer = bn.nn.SyncBatchNorm(3 + rank, process_group=group)
    message = "got 3 channels of float32 on rank 0, 4 channels of float32 on rank 1: give every rank the same model"
    with pytest.raises(bn.SynchronizationError, match=message):
        layer(torch.randn(5, 3 + rank))
    assert layer.num_batches_tracked == 0
    # Nothing is left between the ranks: the next layer works.
    assert bn.nn.SyncBatchNorm(3, process_group=group)(torch.randn(5, 3)).isfinite().all()


@on_both_ranks
def test_another_number_of_channels_in_the_functional_form(rank):
    group = distributed.new_group([0, 1])
    with pytest.raises(bn.SynchronizationError, match="4 channels of float32 on rank 1"):
        bn.nn.functional.batch_norm(torch.randn(5, 3 + rank), None, None, training=True, group=group)


@pytest.mark.parametrize("earlier", [False, True], ids=["at first", "later"])
@on_both_ranks
def test_another_dtype(rank, earlier):
    layer = bn.nn.SyncBatchNorm(3)
    if earlier:
        layer(torch.randn(5, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 3, dtype=torch.bfloat16 if rank else torch.float32)
    message = "got 3 channels of float32 on rank 0, 3 channels of bfloat16 on rank 1: .* autocast on all or none"
    with pytest.raises(bn.SynchronizationError, match=message):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@on_both_ranks
def test_another_dtype_in_a_compiled_graph(rank):
    layer = torch.compile(bn.nn.SyncBatchNorm(3), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, dtype=torch.bfloat16 if rank else torch.float32, requires_grad=True)
    with pytest.raises(RuntimeError, match="the ranks disagree in channels or dtype"):
        layer(x).sum().backward()
    with pytest.raises(RuntimeError, match="the ranks disagree in channels or dtype"), torch.no_grad():
        layer(x)
    torch._dynamo.reset()


@on_both_ranks
def test_a_rank_that_leaves_the_layer_out(rank):
    group = distributed.new_group([0, 1], timeout=SOON)
    layer = bn.nn.SyncBatchNorm(3, process_group=group)
    layer(torch.randn(5, 3))
    if rank == 0:
        began = time.monotonic()
        message = (
            "expected all 2 ranks of process group .* to gather batch-norm statistics with rank 0, got .*Timed out"
        )
        with pytest.raises(RuntimeError, match=message) as failed:
            layer(torch.randn(5, 3))
        assert isinstance(failed.value, bn.SynchronizationError)
        assert failed.value.__cause__ is not None
        assert time.monotonic() - began < 20
        assert layer.num_batches_tracked == 1
    distributed.barrier()


@on_both_ranks
def test_a_rank_that_leaves_the_backward_out(rank):
    group = distributed.new_group([0, 1], timeout=SOON)
    y = bn.nn.SyncBatchNorm(3, process_group=group)(torch.randn(5, 3, requires_grad=True))
    if rank == 0:
        with pytest.raises(
            bn.SynchronizationError, match=r"to add up .* no loss uses: add 0 \* output.sum\(\) to the loss"
        ):
            y.sum().backward()
    distributed.barrier()


@on_both_ranks
def test_the_remedy_for_an_unused_output(rank):
    x = torch.randn(5, 3, requires_grad=True)
    y = bn.nn.SyncBatchNorm(3)(x)
    (y.pow(3).sum() if rank == 0 else 0 * y.sum()).backward()
    assert x.grad.isfinite().all()


def dies(rank, meeting, pipe):
    """Rank 1 is gone after the first batch; rank 0 reports what it is told."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=dt.timedelta(seconds=8)
    )
    layer = bn.nn.SyncBatchNorm(3)
    layer(torch.randn(5, 3)).sum()
    if rank == 1:
        os._exit(1)
    began = time.monotonic()
    try:
        layer(torch.randn(5, 3))
    except RuntimeError as error:
        pipe.send((type(error).__name__, str(error), time.monotonic() - began))
    pipe.close()
    os._exit(0)  # a group that lost a rank cannot be taken down in order


def test_a_rank_that_dies(tmp_path):
    start = multiprocessing.get_context("spawn")
    ours, theirs = start.Pipe()
    workers = [start.Process(target=dies, args=(rank, str(tmp_path / "meeting"), theirs)) for rank in range(2)]
    for worker in workers:
        worker.start()
    theirs.close()
    try:
        assert ours.poll(60), "the surviving rank said nothing for a minute"
        name, message, seconds = ours.recv()
    finally:
        for worker in workers:
            worker.join(5)
            worker.kill()
            worker.join()
    assert name == "SynchronizationError"
    assert "see whether a rank has died or raised" in message
    assert "\n" not in message
    assert seconds < 30
