"""Estimators over streams of batches: what one batch teaches, whatever brings it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from batchnorm._errors import InputError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener
from batchnorm.preprocessing.sources import is_stream, open_source
from batchnorm.preprocessing.sources.readahead import read_ahead

ESTIMATORS = [MeanSubtractor(), StandardScaler(), MinMaxScaler(), Whitener("zca")]
X = np.random.default_rng(0).normal(1e3, 2.0, (101, 4))
WEIGHTS = np.arange(101.0) % 3


def parts() -> Iterator[np.ndarray[Any, Any]]:
    yield from np.split(X, [10, 10, 57])


def loader() -> torch.utils.data.DataLoader[Any]:
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.zeros(101))
    return torch.utils.data.DataLoader(dataset, batch_size=33)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("stream", [parts, loader, lambda: list(parts()), lambda: open_source(parts())])
def test_a_stream_teaches_what_its_rows_do(estimator: Any, stream: Any) -> None:
    whole = type(estimator)(**estimator.get_params()).fit(X)
    estimator.fit(stream())
    np.testing.assert_allclose(estimator.transform(X), whole.transform(X), rtol=0, atol=1e-9)
    assert estimator.n_samples_seen_ == 101
    went_on = type(estimator)(**estimator.get_params()).partial_fit(X).partial_fit(stream())
    assert went_on.n_samples_seen_ == 202


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_weights_are_dealt_out_over_the_parts(estimator: Any) -> None:
    whole = type(estimator)(**estimator.get_params()).fit(X, sample_weight=WEIGHTS)
    estimator.fit(parts(), sample_weight=WEIGHTS)
    np.testing.assert_allclose(estimator.transform(X), whole.transform(X), rtol=0, atol=1e-9)


def test_a_transformed_stream_is_a_stream() -> None:
    scaler = StandardScaler().fit(X)
    out = list(scaler.transform(parts()))
    np.testing.assert_array_equal(np.concatenate(out), scaler.transform(X))
    tensors = list(scaler.inverse_transform(iter([torch.from_numpy(o) for o in out])))
    np.testing.assert_allclose(torch.cat(tensors).numpy(), X, rtol=1e-14)


def test_a_memory_map_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.preprocessing.sources.source.PART_BYTES", 1000)
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert len(list(open_source(mapped))) == 4
    np.testing.assert_allclose(StandardScaler().fit(mapped).mean_, X.mean(0), rtol=1e-14)
    assert isinstance(StandardScaler().fit(X).transform(mapped), np.ndarray)


def test_channels_of_a_stream_of_images() -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 3, 5, 6), dtype=np.uint8)
    scaler = StandardScaler(channel_axis=1).fit(iter([images[:7], images[7:]]))
    np.testing.assert_allclose(scaler.mean_, images.mean((0, 2, 3)), rtol=1e-14)
    # A list is one array there, of samples with axes of their own.
    np.testing.assert_allclose(StandardScaler(channel_axis=1).fit(list(images)).mean_, scaler.mean_, rtol=1e-14)


def test_what_is_a_stream() -> None:
    assert is_stream("data.npy")
    assert is_stream(Path("data.npy"))
    assert is_stream(iter([]))
    assert is_stream([X, X])
    for other in (X, torch.ones(2, 2), [[1.0, 2.0]], [np.ones(3)], [], {"a": [1]}, None, 3, range(3)):
        assert not is_stream(other)


def test_errors_name_the_row_of_the_stream_and_leave_the_estimator_as_it_was() -> None:
    scaler = StandardScaler().fit(X)
    mean = scaler.mean_
    bad = X.copy()
    bad[60, 2] = np.inf
    with pytest.raises(InputError, match="row 60, column 2"):
        scaler.fit(iter(np.split(bad, [10, 57])))
    with pytest.raises(ShapeError, match="no samples in the generator"):
        scaler.fit(X[:0] for _ in range(3))
    with pytest.raises(ShapeError, match="X has 3 features, but StandardScaler is expecting 4"):
        scaler.fit(iter([X, X[:, :3]]))
    with pytest.raises(ShapeError, match="one weight a sample, got 100 for more samples"):
        scaler.fit(parts(), sample_weight=WEIGHTS[:-1])
    with pytest.raises(ShapeError, match="one weight a sample, got 102 for 101 samples"):
        scaler.fit(parts(), sample_weight=np.ones(102))
    with pytest.raises(InputError, match="all are zero"):
        scaler.fit(parts(), sample_weight=np.zeros(101))
    with pytest.raises(InputError, match=r"got -1\.0 for row 70"):
        scaler.fit(parts(), sample_weight=np.where(np.arange(101) == 70, -1, WEIGHTS))
    assert scaler.mean_ is mean


def test_batches_in_dictionaries_need_a_key() -> None:
    with pytest.raises(InputError, match=r"batch 0 of the list_iterator is a dict with .*: pass columns=KEY"):
        StandardScaler().fit(iter([{"image": X}]))
    np.testing.assert_allclose(
        StandardScaler().fit(open_source(iter([{"image": X}]), columns="image")).mean_, X.mean(0)
    )


def test_reading_ahead_keeps_order_errors_and_no_thread() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise InputError("broken")

    seen: list[int] = []
    with pytest.raises(InputError, match="broken"):
        seen.extend(read_ahead(failing(), 2))
    closed: list[bool] = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    reader = read_ahead(endless(), 2)
    assert next(reader) == 1
    reader.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name == "batchnorm-read-ahead"]


def test_progress_counts_rows() -> None:
    told: list[tuple[int, int | None]] = []
    StandardScaler().fit(open_source(parts(), progress=lambda done, all_: told.append((done, all_))))
    assert told[-1] == (101, None)


@pytest.mark.parametrize("estimator", [StandardScaler(), Whitener("pca", n_components=2)], ids=str)
def test_set_output_of_a_stream_is_a_stream_of_frames(estimator: Any) -> None:
    frames = [pd.DataFrame(part, columns=list("abcd"), index=range(7, 7 + len(part))) for part in parts()]
    estimator.fit(iter(frames))
    plain = np.concatenate([np.asarray(out) for out in estimator.transform(iter(frames))])
    estimator.set_output(transform="pandas")
    out = list(estimator.transform(iter(frames)))
    assert [list(each.columns) for each in out] == [list(estimator.get_feature_names_out())] * len(out)
    assert list(out[0].index) == list(frames[0].index)
    np.testing.assert_array_equal(pd.concat(out).to_numpy(), plain)
    assert isinstance(estimator.transform(frames[0]), pd.DataFrame)
    estimator.set_output(transform="polars")
    np.testing.assert_array_equal(pl.concat(list(estimator.transform(iter(frames)))).to_numpy(), plain)
    estimator.set_output(transform="default")
    assert all(isinstance(each, np.ndarray) for each in estimator.transform(iter(frames)))
