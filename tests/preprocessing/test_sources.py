"""Sources: every kind of file and container gives the statistics of the array it holds."""

from __future__ import annotations

import gzip
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from batchnorm._errors import DtypeError, InputError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener
from batchnorm.preprocessing.sources import is_stream, open_source

NAMES = ["a", "b", "c", "d"]
X = np.random.default_rng(0).normal([1e3, -5.0, 0.0, 1e-3], [2.0, 1.0, 3.0, 1e-3], (101, 4))
X[5, 1] = X[70, 3] = np.nan
WEIGHTS = np.arange(101.0) % 3


def table(columns: dict[str, Any] | None = None) -> pa.Table:
    nulls = {name: pa.array(X[:, i], from_pandas=True) for i, name in enumerate(NAMES)}
    return pa.table(nulls | (columns or {}))


def write_npz(path: Path) -> None:
    np.savez_compressed(path, x=X)


def write_csv_gz(path: Path) -> None:
    text = io.BytesIO()
    pa.csv.write_csv(table(), text)
    path.write_bytes(gzip.compress(text.getvalue()))


def write_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=40)


WRITERS = {
    "x.npy": lambda path: np.save(path, X),
    "fortran.npy": lambda path: np.save(path, np.asfortranarray(X)),
    "foreign.npy": lambda path: np.save(path, X.astype(">f8")),
    "x.npz": write_npz,
    "fortran.npz": lambda path: np.savez(path, x=np.asfortranarray(X)),
    "x.safetensors": lambda path: save_file({"x": torch.from_numpy(X)}, path),
    "x.parquet": lambda path: pq.write_table(table(), path, row_group_size=30),
    "lists.parquet": lambda path: pq.write_table(
        pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)}), path, row_group_size=30
    ),
    "x.arrow": lambda path: pa.feather.write_feather(table(), path, compression="lz4", chunksize=40),
    "plain.feather": lambda path: pa.feather.write_feather(table(), path, compression="uncompressed", chunksize=40),
    "stream.arrow": write_stream,
    "x.csv": lambda path: pa.csv.write_csv(table(), path),
    "x.csv.gz": write_csv_gz,
    "x.tsv": lambda path: pa.csv.write_csv(table(), path, pa.csv.WriteOptions(delimiter="\t")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    for name, write in WRITERS.items():
        write(path / name)
    return path


def rows(source: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(part.values) for part in source])


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_holds_what_was_written(folder: Path, name: str) -> None:
    source = open_source(folder / name)
    np.testing.assert_array_equal(rows(source), X)
    np.testing.assert_array_equal(rows(source), X)  # again
    assert source.rows == (None if "csv" in name or "tsv" in name or "stream" in name else 101)
    has_names = source.names == NAMES
    assert has_names == (
        name.rpartition(".")[2] in ("parquet", "arrow", "feather", "csv", "gz", "tsv") and "lists" not in name
    )


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=8)
@given(batch_rows=st.integers(1, 120))
def test_statistics_are_the_arrays_whatever_the_parts(folder: Path, name: str, batch_rows: int) -> None:
    source = open_source(folder / name, batch_rows=batch_rows)
    told: list[Any] = []
    source.progress = lambda done, known: told.append((done, known))
    scaler = StandardScaler().fit(source)
    whole = StandardScaler().fit(X)
    for attribute in ("mean_", "var_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(scaler, attribute), getattr(whole, attribute), rtol=1e-12, atol=0)
    assert told[-1] == (101, source.rows)
    assert all(later[0] - earlier[0] <= batch_rows for earlier, later in itertools.pairwise(told))
    start = 0
    for part in open_source(folder / name, batch_rows=batch_rows):
        assert (part.row, part.file) == (start, str(folder / name))
        start += part.rows


@pytest.mark.parametrize(
    "estimator", [MeanSubtractor(), MinMaxScaler(), Whitener("zca")], ids=lambda e: type(e).__name__
)
def test_estimators_take_paths(folder: Path, estimator: Any) -> None:
    whole = type(estimator)(**estimator.get_params()).fit(X)
    estimator.fit(str(folder / "x.parquet"))
    assert list(estimator.feature_names_in_) == NAMES
    out = np.concatenate(list(estimator.transform(open_source(folder / "x.parquet", batch_rows=17))))
    np.testing.assert_allclose(out, whole.transform(X), rtol=0, atol=1e-9)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_columns_and_weights_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    WRITERS[f"x.{suffix}"](path)
    frame = table({"w": WEIGHTS, "city": ["Oslo"] * 101, "n": np.arange(101, dtype=np.int8)})
    {"parquet": pq.write_table, "arrow": pa.feather.write_feather, "csv": pa.csv.write_csv}[suffix](frame, path)
    source = open_source(path, columns=["d", "a"], weights="w", batch_rows=13)
    np.testing.assert_array_equal(rows(source), X[:, [3, 0]])
    np.testing.assert_array_equal(np.concatenate([part.weights for part in source]), WEIGHTS)
    scaler = StandardScaler().fit(source)
    np.testing.assert_allclose(scaler.var_, StandardScaler().fit(X[:, [3, 0]], sample_weight=WEIGHTS).var_, rtol=1e-12)
    assert source.names == list(scaler.feature_names_in_) == ["d", "a"]
    assert open_source(path, columns="n", weights="w").names == ["n"]


def test_an_array_of_several_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, w=WEIGHTS, other=X[:, 0])
    save_file({name: torch.from_numpy(a) for name, a in (("x", X), ("w", WEIGHTS))}, tmp_path / "x.safetensors")
    for name in ("x.npz", "x.safetensors"):
        source = open_source(tmp_path / name, columns="x", weights="w", batch_rows=40)
        np.testing.assert_array_equal(rows(source), X)
        np.testing.assert_array_equal(np.concatenate([part.weights for part in source]), WEIGHTS)
    assert open_source(tmp_path / "x.safetensors", weights="w").rows == 101


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"])
def test_numbers_of_every_type_are_exact(tmp_path: Path, dtype: str) -> None:
    values = (np.arange(60).reshape(20, 3) % 100).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    save_file({"x": torch.from_numpy(values)}, tmp_path / "x.safetensors")
    pq.write_table(pa.table({name: values[:, i] for i, name in enumerate("abc")}), tmp_path / "x.parquet")
    for name in ("x.npy", "x.safetensors", "x.parquet"):
        found = rows(open_source(tmp_path / name, batch_rows=7))
        np.testing.assert_array_equal(found, values)
        assert found.dtype == (values.dtype if name != "x.parquet" or values.dtype.kind == "f" else np.float64)


def test_types_of_columns_meet_in_one_that_holds_them_all(tmp_path: Path) -> None:
    import decimal

    columns = {
        "half": pa.array([1.5, None, 2.0], pa.float16()),
        "byte": pa.array([1, 200, None], pa.uint8()),
        "flag": pa.array([True, None, False]),
        "price": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3.50")]),
        "none": pa.nulls(3),
        "long": pa.array([2**53, None, 1]),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    expected = np.array(
        [[1.5, 1, 1, 1.25, np.nan, 2**53], [np.nan, 200, *[np.nan] * 4], [2, np.nan, 0, -3.5, np.nan, 1]]
    )
    np.testing.assert_array_equal(rows(open_source(tmp_path / "x.parquet")), expected)
    for chosen, dtype in ((["half", "byte"], "float16"), (["byte", "flag"], "float64"), (["half", "long"], "float64")):
        found = rows(open_source(tmp_path / "x.parquet", columns=chosen))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected[:, [list(columns).index(name) for name in chosen]])


def test_bfloat16_stays_what_it_is(tmp_path: Path) -> None:
    values = torch.randn(20, 3).bfloat16()
    save_file({"x": values}, tmp_path / "x.safetensors")
    parts = list(open_source(tmp_path / "x.safetensors", batch_rows=8))
    assert torch.equal(torch.cat([part.values for part in parts]), values)
    np.testing.assert_allclose(StandardScaler().fit(tmp_path / "x.safetensors").mean_, values.double().mean(0))


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, piece in zip((10, 9, 1), np.split(X, [30, 60]), strict=True):
        (tmp_path / "deep").mkdir(exist_ok=True)
        np.save(tmp_path / "deep" / f"part-{number}.npy", piece)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").write_text("of no known kind")
    ordered = np.concatenate([X[60:], X[30:60], X[:30]])
    for what in (tmp_path, str(tmp_path / "**" / "*.npy"), [tmp_path / "deep" / f"part-{n}.npy" for n in (1, 9, 10)]):
        source = open_source(what)
        assert is_stream(what)
        np.testing.assert_array_equal(rows(source), ordered)
        assert source.rows == 101
    np.testing.assert_array_equal([part.row for part in open_source(tmp_path, batch_rows=20)][:3], [0, 20, 40])


def test_partition_columns_are_features_only_if_asked_for(tmp_path: Path) -> None:
    frame = table({"year": np.where(np.arange(101) < 40, 2020, 2021), "city": ["a b"] * 101})
    pq.write_to_dataset(frame, tmp_path / "set", partition_cols=["year", "city"])
    source = open_source(tmp_path / "set")
    assert source.names == NAMES
    np.testing.assert_array_equal(rows(source), X)
    with_year = rows(open_source(str(tmp_path / "set" / "year=*"), columns=["year", "a"]))
    np.testing.assert_array_equal(with_year, np.column_stack([np.where(np.arange(101) < 40, 2020, 2021), X[:, 0]]))
    np.testing.assert_array_equal(rows(open_source(tmp_path / "set", columns="year")), with_year[:, :1])
    with pytest.raises(InputError, match="partition column 'city' is 'a b', expected a number"):
        list(open_source(tmp_path / "set", columns=["city"]))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_columns_in_another_order_are_matched_by_name(tmp_path: Path, suffix: str) -> None:
    write: Any = {"parquet": pq.write_table, "csv": pa.csv.write_csv}[suffix]
    write(table().slice(0, 50), tmp_path / f"1.{suffix}")
    write(table().slice(50).select(["c", "a", "d", "b"]), tmp_path / f"2.{suffix}")
    np.testing.assert_array_equal(rows(open_source(tmp_path)), X)


def containers() -> Iterator[Any]:
    frame = pd.DataFrame(X, columns=NAMES)
    reader = pa.RecordBatchReader.from_batches(table().schema, table().to_batches(max_chunksize=40))
    yield from (X, torch.from_numpy(X), X.tolist(), frame, pl.DataFrame(X, schema=NAMES), table(), reader)
    yield from (
        table().to_batches()[0],
        pa.dataset.dataset(table()),
        torch.utils.data.TensorDataset(torch.from_numpy(X)),
    )


@pytest.mark.parametrize("container", list(containers()), ids=lambda c: type(c).__name__)
def test_containers_in_memory(container: Any) -> None:
    source = open_source(container, batch_rows=30)
    assert source.rows in (101, None)
    parts = list(source)
    assert sum(part.rows for part in parts) == 101
    assert max(part.rows for part in parts) == 30
    np.testing.assert_array_equal(np.concatenate([np.asarray(part.values) for part in parts]), X)
    if source.again:
        np.testing.assert_allclose(StandardScaler().fit(container).var_, StandardScaler().fit(X).var_, rtol=1e-12)


def test_blocks_of_an_array_share_its_memory() -> None:
    for array in (X, torch.from_numpy(X)):
        assert all(np.shares_memory(np.asarray(part.values), X) for part in open_source(array, batch_rows=30))


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame, pa.table], ids=["pandas", "polars", "arrow"])
def test_columns_of_a_frame(frame: Any) -> None:
    source = open_source(frame({**dict(zip(NAMES, X.T, strict=True)), "w": WEIGHTS}), columns=["d", "a"], weights="w")
    scaler = StandardScaler().fit(source)
    assert list(scaler.feature_names_in_) == source.names == ["d", "a"]
    np.testing.assert_allclose(scaler.var_, StandardScaler().fit(X[:, [3, 0]], sample_weight=WEIGHTS).var_, rtol=1e-12)
    with pytest.raises(InputError, match=r"the (DataFrame|Table): no column 'ww': did you mean 'w'\?"):
        open_source(frame({"w": WEIGHTS}), columns="ww")


class Samples(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for row, weight in zip(torch.from_numpy(X), WEIGHTS, strict=True):
            yield {"x": row, "weight": weight}


def test_samples_of_a_dataset_are_stacked() -> None:
    source = open_source(Samples(), columns="x", weights="weight", batch_rows=40)
    assert [part.rows for part in source] == [40, 40, 21]
    np.testing.assert_allclose(
        StandardScaler().fit(source).var_, StandardScaler().fit(X, sample_weight=WEIGHTS).var_, rtol=1e-12
    )
    with pytest.raises(InputError, match=r"sample 0 of the Samples is a dict with .*: pass columns=KEY"):
        StandardScaler().fit(Samples())


def test_batches_of_frames_and_dictionaries_choose_by_name() -> None:
    frame = pd.DataFrame({**dict(zip(NAMES, X.T, strict=True)), "w": WEIGHTS})
    source = open_source(iter([frame[:50], frame[50:]]), columns=["b"], weights="w")
    assert not source.again
    expected = StandardScaler().fit(X[:, [1]], sample_weight=WEIGHTS)
    np.testing.assert_allclose(StandardScaler().fit(source).var_, expected.var_, rtol=1e-12)
    dicts = [{"x": X[:50, [1]], "w": WEIGHTS[:50]}, {"x": X[50:, [1]], "w": WEIGHTS[50:]}]
    source = open_source(iter(dicts), columns="x", weights="w")
    np.testing.assert_allclose(StandardScaler().fit(source).var_, expected.var_, rtol=1e-12)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.from_numpy(X)), 30, drop_last=True)
    assert open_source(loader).rows == 90


def images(folder: Path, mode: str, sizes: list[tuple[int, int]]) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    made = []
    for number, (height, width) in enumerate(sizes):
        channels = {"L": (), "RGB": (3,), "RGBA": (4,), "I;16": ()}[mode]
        pixels = generator.integers(0, 60000 if mode == "I;16" else 256, (height, width, *channels))
        pixels = pixels.astype(np.uint16 if mode == "I;16" else np.uint8)
        Image.fromarray(pixels).save(folder / f"image {number}.png")
        made.append(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0))
    return made


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_a_folder_of_images_has_statistics_per_channel(tmp_path: Path, mode: str) -> None:
    made = images(tmp_path, mode, [(5, 7)] * 11 + [(4, 4), (4, 4), (9, 3)])
    source = open_source(tmp_path, batch_rows=4)
    parts = list(source)
    assert [part.rows for part in parts] == [4, 4, 3, 2, 1]
    np.testing.assert_array_equal(parts[0].values, made[:4])
    assert parts[0].values.dtype == made[0].dtype
    scaler = StandardScaler(channel_axis=1).fit(source)
    pixels = np.concatenate([image.reshape(len(image), -1) for image in made], axis=1)
    np.testing.assert_allclose(scaler.mean_, pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(scaler.var_, pixels.astype(float).var(1), rtol=1e-12)
    # One size: a batch of every image. A list of paths is no array of samples.
    same = [tmp_path / f"image {number}.png" for number in range(11)]
    assert StandardScaler(channel_axis=1).fit(same).n_samples_seen_ == 11 * 5 * 7


def test_images_in_several_modes_are_converted_if_asked(tmp_path: Path) -> None:
    made = images(tmp_path, "RGB", [(4, 4)])
    Image.fromarray(made[0][0]).save(tmp_path / "image 1.png")
    Image.fromarray(np.moveaxis(made[0], 0, -1)).quantize(16).save(tmp_path / "image 0b.gif")
    with pytest.raises(
        InputError, match=r"image 1\.png: the mode of this image is L, that of .*image 0\.png is RGB: conv"
    ):
        list(open_source(tmp_path))
    found = rows(open_source(tmp_path, columns="RGB"))
    assert found.shape == (3, 3, 4, 4)
    np.testing.assert_array_equal(found[2], np.stack([made[0][0]] * 3))
    assert rows(open_source(tmp_path, columns="L")).shape == (3, 1, 4, 4)


def test_what_is_no_source() -> None:
    for other in (3, None, object()):
        with pytest.raises(DtypeError, match="cannot read batches from a"):
            open_source(other)
    with pytest.raises(InputError, match="the ndarray has no names of columns to choose from"):
        open_source(X, columns="a")
    source = open_source(X)
    assert open_source(source, progress=True) is source
    with pytest.raises(InputError, match="is open already: choose columns, weights and batch_rows where it is opened"):
        open_source(source, batch_rows=3)
