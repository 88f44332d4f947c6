"""``fit`` on every rank: each reads its shard, and all learn what one process learns of the whole."""

from __future__ import annotations

import datetime as dt
import itertools
import queue
import re
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import distributed

import batchnorm as bn
from batchnorm.preprocessing import CORAL, MeanSubtractor, MinMaxScaler, StandardScaler, Whitener, local
from batchnorm.preprocessing.distributed import ranks
from distributed.pair import on_both_ranks

SOON = dt.timedelta(seconds=3)
ESTIMATORS = {
    "mean": MeanSubtractor(),
    "standard": StandardScaler(),
    "minmax": MinMaxScaler(),
    "pca": Whitener(),
    "zca": Whitener("zca", shrinkage="ledoit-wolf"),
    "gram": Whitener(solver="gram"),
}


def data(dtype=np.float64):
    """300 samples of 4 features far from zero, some values missing, with weights of which some are zero."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((300, 4)) * [1, 2, 0.5, 3] + 1e6).astype(dtype)
    x[rng.random(x.shape) < 0.05] = np.nan
    return x, rng.integers(0, 4, 300).astype(float)


def bits(estimator):
    """All that was learned, as one vector of bytes."""
    values = [tensor.contiguous().reshape(-1) for tensor in estimator._stats.to_dict().values()]
    if isinstance(estimator, Whitener):
        values.append(torch.from_numpy(estimator.whitening_.copy()).reshape(-1))
    return torch.cat(values).view(torch.uint8)


def learned(estimator):
    """The statistics by name, without samples that a whitener may have kept as such."""
    stats = estimator._stats
    return (stats.whole() if isinstance(estimator, Whitener) else stats).to_dict()


def assert_like_one_process(estimator, x, weights=None):
    """The statistics are those of ``x`` in one process, and have the same bits on both ranks."""
    with local():
        whole = type(estimator)(**estimator.get_params()).fit(x, sample_weight=weights)
    assert estimator.n_features_in_ == whole.n_features_in_
    np.testing.assert_array_equal(estimator.n_samples_seen_, whole.n_samples_seen_)
    scale = learned(whole)
    for name, tensor in learned(estimator).items():
        if name != "mean_low":  # the rounding of the mean itself
            torch.testing.assert_close(tensor, scale[name], rtol=1e-12, atol=1e-12 * float(scale[name].abs().max()))
    mine = bits(estimator)
    theirs = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(theirs, mine)
    assert torch.equal(theirs[0], theirs[1])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("cut", [150, 1, 299, 0, 300])
@pytest.mark.parametrize("name", list(ESTIMATORS))
@on_both_ranks
def test_any_shards(rank, name, cut, weighted):
    estimator = ESTIMATORS[name]
    x, weights = data()
    shard = slice(0, cut) if rank == 0 else slice(cut, None)
    if not weighted:
        weights = None
    estimator.fit(x[shard], sample_weight=None if weights is None else weights[shard])
    assert_like_one_process(estimator, x, weights)


@pytest.mark.parametrize("kind", ["tensor", "frame", "stream", "images"])
@on_both_ranks
def test_any_container(rank, kind):
    x, _ = data(np.float32)
    x, mine = x[:200], slice(0, 70) if rank == 0 else slice(70, 200)
    scaler = StandardScaler()
    if kind == "tensor":
        scaler.fit(torch.from_numpy(x[mine]))
    elif kind == "frame":
        scaler.fit(pd.DataFrame(x[mine], columns=list("abcd")))
        assert list(scaler.feature_names_in_) == list("abcd")
    elif kind == "stream":
        scaler.fit(iter(np.array_split(x[mine], 7)))
    else:
        x = x.reshape(50, 4, 2, 2)
        scaler = StandardScaler(channel_axis=1).fit(x[:20] if rank == 0 else x[20:])
    assert_like_one_process(scaler, x)


@pytest.mark.parametrize("rest", ["no samples", "no batches", "no weight"])
@on_both_ranks
def test_a_rank_with_nothing_takes_names_and_width(rank, rest):
    frame = pd.DataFrame(data()[0], columns=list("abcd"))
    scaler = StandardScaler()
    if rank == 0:
        scaler.fit(frame)
    elif rest == "no samples":
        scaler.fit(frame[:0])
    elif rest == "no batches":
        scaler.fit(iter([]))
    else:
        scaler.fit(frame, sample_weight=np.zeros(300))
    assert list(scaler.feature_names_in_) == list("abcd")
    assert_like_one_process(scaler, frame)


@on_both_ranks
def test_nothing_on_any_rank(rank):  # noqa: ARG001
    scaler = StandardScaler()
    with pytest.raises(bn.ShapeError, match="Found array with 0 sample"):
        scaler.fit(np.empty((0, 3)))
    assert not scaler.__sklearn_is_fitted__()


@on_both_ranks
def test_a_feature_that_only_one_rank_has_seen(rank):
    x = np.arange(24.0).reshape(8, 3)
    x[:4, 0] = x[4:, 1] = np.nan
    assert_like_one_process(StandardScaler().fit(x[4 * rank : 4 * rank + 4]), x)


@on_both_ranks
def test_a_fit_of_its_own(rank):
    x, _ = data()
    if rank == 0:
        with local():
            scaler = StandardScaler().fit(x[:100])
        assert scaler.n_samples_seen_.max() <= 100
    part = StandardScaler().partial_fit(x[: 100 + rank])  # never collective
    assert part.n_samples_seen_.max() <= 100 + rank


@pytest.mark.parametrize("name", list(ESTIMATORS))
@on_both_ranks
def test_partial_fits_and_then_reduce(rank, name):
    x, weights = data()
    estimator = type(ESTIMATORS[name])(**ESTIMATORS[name].get_params())
    for batch in np.array_split(np.arange(300), 6)[rank::2]:
        estimator.partial_fit(x[batch], sample_weight=weights[batch])
    assert estimator.reduce() is estimator
    assert_like_one_process(estimator, x, weights)


@on_both_ranks
def test_two_domains(rank):
    source = np.random.default_rng(0).standard_normal((60, 4))
    target = source[:50] @ np.random.default_rng(1).standard_normal((4, 4)) + 5
    found = CORAL().fit(source[rank::2], target[: 40 * rank])  # rank 0 has no sample of the target
    with local():
        whole = CORAL().fit(source, target[:40])
    np.testing.assert_allclose(found.matrix_, whole.matrix_, rtol=1e-9, atol=1e-9)
    assert (found.n_samples_seen_, found.n_target_samples_seen_) == (60, 40)


@on_both_ranks
def test_reduce_of_a_rank_that_has_learned_nothing(rank):
    x, _ = data()
    scaler = StandardScaler()
    if rank == 1:
        scaler.partial_fit(x)
    assert_like_one_process(scaler.reduce(), x)
    with pytest.raises(NotFittedError):
        StandardScaler().reduce()
    alone = distributed.new_group([rank], use_local_synchronization=True)
    assert scaler.reduce(alone).n_samples_seen_.max() <= 300


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("class", "same estimator on all ranks, got MeanSubtractor.* on rank 0 and StandardScaler"),
        ("parameter", r"same estimator on all ranks, got .*with_std=True\) on rank 0 and .*with_std=False\) on rank 1"),
        ("width", "same number of features on all ranks, got 4 on rank 0 and 3 on rank 1"),
        ("names", r"same feature names on all ranks, got \['a', 'b', 'c', 'd'\] on rank 0 and \['a', 'b', 'c', 'e'\]"),
    ],
)
@on_both_ranks
def test_ranks_that_disagree(rank, case, message):
    x, _ = data()
    estimator = StandardScaler()
    if case == "class" and rank == 0:
        estimator = MeanSubtractor()
    elif case == "parameter":
        estimator = StandardScaler(with_std=rank == 0)
    elif case == "width":
        x = x[:, : 4 - rank]
    elif case == "names":
        x = pd.DataFrame(x, columns=list("abcd" if rank == 0 else "abce"))
    with local():
        estimator.fit(x)
    before = dict(vars(estimator))
    with pytest.raises(bn.SynchronizationError, match=message) as raised:
        estimator.fit(x)
    assert "\n" not in str(raised.value)
    assert vars(estimator) == before
    # Nothing is left between the ranks.
    assert_like_one_process(StandardScaler().fit(data()[0][rank::2]), data()[0])


@pytest.mark.parametrize("case", ["infinite", "text", "parameter", "unreadable"])
@on_both_ranks
def test_a_rank_that_fails(rank, case):
    x, _ = data()
    estimator = MinMaxScaler()
    if rank == 1:
        if case == "infinite":
            x[7, 2] = np.inf
        elif case == "parameter":
            estimator = MinMaxScaler((1, 0))
        elif case == "text":
            x = np.array([["a", "b"]])
        else:
            x = (1 / 0 for _ in range(2))
    raised = {
        "infinite": (bn.InputError, "infinity: row 7, column 2"),
        "text": (bn.InputError, "got text"),
        "parameter": (bn.InputError, "Minimum of desired feature range"),
        "unreadable": (ZeroDivisionError, "division by zero"),
    }[case]
    before = dict(vars(estimator))
    if rank == 0:
        raised = bn.SynchronizationError, f"nothing was learned, because fit failed on rank 1: .*{raised[1]}"
    with pytest.raises(raised[0], match=raised[1]):
        estimator.fit(x)
    assert vars(estimator) == before
    assert_like_one_process(StandardScaler().fit(data()[0][rank::2]), data()[0])


@on_both_ranks
def test_randomized_whitening_is_for_one_process(rank):
    x, whitener = np.random.default_rng(rank).standard_normal((50, 8)), Whitener(solver="randomized", n_components=2)
    with pytest.raises(bn.InputError, match="solver='randomized' cannot learn on several processes"):
        whitener.fit(x)
    with local():
        assert whitener.fit(x).n_components_ == 2


@on_both_ranks
def test_a_rank_that_does_not_come(rank):
    group = distributed.new_group([0, 1], timeout=SOON)
    scaler = StandardScaler().partial_fit(data()[0])
    before = dict(vars(scaler))
    if rank == 0:
        usual, ranks.PATIENCE = ranks.PATIENCE, 0.2
        began = time.monotonic()
        said = r"has waited .* in fit for rank 1, which did not call it: .* `with batchnorm.preprocessing.local\(\):`"
        message = "expected all 2 ranks to fit, rank 1 did not within 3 seconds, the timeout of the process group"
        with pytest.warns(RuntimeWarning, match=said), pytest.raises(bn.SynchronizationError, match=message):
            scaler.reduce(group)
        ranks.PATIENCE = usual
        assert 2.9 < time.monotonic() - began < 20
        assert vars(scaler) == before
    distributed.barrier()
    scaler.reduce(group)  # as if it had not been tried
    assert scaler.n_samples_seen_.max() > 500


@on_both_ranks
def test_a_rank_that_reads_longer_is_not_reported(rank):
    usual, ranks.PATIENCE = ranks.PATIENCE, 0.2

    def slowly():
        for part in np.array_split(data()[0], 3):
            if rank == 1:
                time.sleep(0.3)
            yield part

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert StandardScaler().fit(slowly()).n_samples_seen_.max() > 500
    finally:
        ranks.PATIENCE = usual


@on_both_ranks
def test_an_interrupted_rank_can_start_again(rank):
    """A rank that is stopped by hand withdraws; when it fits after all, the ranks meet."""

    def stopped():
        yield data()[0][:10]
        raise KeyboardInterrupt

    if rank == 1:
        with pytest.raises(KeyboardInterrupt):
            StandardScaler().fit(stopped())
    assert_like_one_process(StandardScaler().fit(data()[0][rank::2]), data()[0])


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_tree_keeps_the_order_of_any_number_of_ranks(size, monkeypatch):
    """The merges alone, with queues for the wire and a thread for a rank."""

    class Ranks(list):  # what was merged, in order
        def merge(self, other):
            return Ranks(self + other)

    me = threading.local()
    wire = {pair: queue.Queue() for pair in itertools.product(range(size), repeat=2)}
    wholes = {}
    monkeypatch.setattr(ranks, "_send", lambda stats, to, _: wire[me.rank, to].put(stats))
    monkeypatch.setattr(ranks, "_receive", lambda source, _: wire[source, me.rank].get(timeout=30))
    monkeypatch.setattr(ranks, "_hand_out", lambda stats, _: stats)
    monkeypatch.setattr(ranks.distributed, "get_rank", lambda _: me.rank)
    monkeypatch.setattr(ranks.distributed, "get_world_size", lambda _: size)

    def run(rank):
        me.rank = rank
        wholes[rank] = ranks._reduced(None if rank == 1 else Ranks([rank]), None)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wholes[0] == [rank for rank in range(size) if rank != 1]


def test_one_process_needs_no_ranks():
    assert not ranks.active()
    scaler = StandardScaler().fit(data()[0])
    before = dict(vars(scaler))
    assert scaler.reduce() is scaler
    assert vars(scaler) == before
    with pytest.raises(NotFittedError, match=re.escape("StandardScaler instance is not fitted yet")):
        StandardScaler().reduce()
