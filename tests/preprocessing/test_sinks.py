"""transform_file: every kind of file in and out, by blocks, whole or not at all, and gone on with after a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm._errors import InputError, OutputError, ShapeError
from batchnorm.preprocessing import MinMaxScaler, StandardScaler, Whitener, transform_file
from batchnorm.preprocessing.sinks.sink import AppendingSink, Sink
from batchnorm.preprocessing.sinks.tables import SegmentedSink

pa = pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = 500
NAMES = ["a", "b", "c"]
X = np.random.default_rng(0).normal(1e3, 2.0, (ROWS, 3))
X[7, 1] = np.nan
SCALER = StandardScaler().fit(X)
ROTATION = Whitener("pca", n_components=2).fit(X)


def frame() -> Any:
    made = pd.DataFrame(X, columns=NAMES)
    made.insert(0, "id", np.arange(ROWS) % 9)
    made["label"] = ['say "x", y' if i % 50 == 0 else f"l{i}" for i in range(ROWS)]
    return made


def named(estimator: Any) -> Any:
    return type(estimator)(**estimator.get_params()).fit(frame()[NAMES])


WRITE: dict[str, Callable[[Path], Any]] = {
    "npy": lambda path: np.save(path, X),
    "npz": lambda path: np.savez(path, x=X, y=np.arange(ROWS)),
    "safetensors": lambda path: safetensors().save_file({"x": X, "y": np.arange(ROWS)}, path, {"made": "by hand"}),
    "csv": lambda path: frame().to_csv(path, index=False),
    "tsv": lambda path: frame().to_csv(path, index=False, sep="\t"),
    "parquet": lambda path: pq.write_table(pa.Table.from_pandas(frame()), path, row_group_size=120),
    "arrow": lambda path: feather().write_feather(frame(), path, compression="uncompressed"),
    "feather": lambda path: feather().write_feather(frame(), path),
}
ARRAYS = ("npy", "npz", "safetensors")


def safetensors() -> Any:
    import safetensors.numpy

    return safetensors.numpy


def feather() -> Any:
    import pyarrow.feather

    return pyarrow.feather


def contents(path: Path) -> Any:
    """An array, or a frame."""
    kind = path.suffix[1:]
    if kind == "npy":
        return np.load(path)
    if kind in ("npz", "safetensors"):
        tensors = dict(np.load(path)) if kind == "npz" else safetensors().load_file(path)
        return tensors[next(iter(tensors.keys() - {"y"}))]
    if kind in ("csv", "tsv"):
        return pd.read_csv(path, sep="\t" if kind == "tsv" else ",")
    return pq.read_table(path).to_pandas() if kind == "parquet" else feather().read_feather(path)


def source(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    WRITE[kind](path)
    return path


@pytest.fixture(params=sorted(WRITE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("rows", [None, 37])
@pytest.mark.parametrize("other", sorted(WRITE))
def test_every_kind_becomes_every_kind(tmp_path: Path, kind: str, other: str, rows: int | None) -> None:
    table = kind not in ARRAYS
    columns = ["x"] if kind in ("npz", "safetensors") else None
    scaler = named(SCALER) if table else SCALER
    out = tmp_path / f"out.{other}"
    done = transform_file(scaler, source(tmp_path, kind), out, batch_rows=rows, columns=columns)
    assert (done.rows, done.files, done.resumed, done.path) == (ROWS, 1, 0, out)
    found = contents(out)
    if other in ARRAYS:
        np.testing.assert_allclose(found, SCALER.transform(X), atol=1e-12)
    else:
        expected = SCALER.transform(X)
        np.testing.assert_allclose(found[NAMES if table else ["x0", "x1", "x2"]].to_numpy(), expected, atol=1e-12)
        if table:
            # The other columns are as they were, where they were.
            assert list(found.columns) == ["id", *NAMES, "label"]
            assert found["label"].tolist() == frame()["label"].tolist()
            assert found["id"].astype(int).tolist() == frame()["id"].tolist()
    assert sorted(item.name for item in tmp_path.iterdir()) == [f"data.{kind}", f"out.{other}"]


def test_there_and_back(tmp_path: Path, kind: str) -> None:
    estimator = ROTATION if kind in ARRAYS else named(ROTATION)
    there, back = tmp_path / f"there.{kind}", tmp_path / f"back.{kind}"
    columns = ["x"] if kind in ("npz", "safetensors") else None
    transform_file(estimator, source(tmp_path, kind), there, columns=columns)
    transform_file(estimator, there, back, inverse=True, columns=columns)
    found = contents(there)
    if kind in ARRAYS:
        np.testing.assert_array_equal(found, ROTATION.transform(X))
        np.testing.assert_allclose(contents(back), ROTATION.inverse_transform(ROTATION.transform(X)))
    else:
        assert list(found.columns) == ["id", "whitener0", "whitener1", "label"]
        assert list(contents(back).columns) == ["id", *NAMES, "label"]
        np.testing.assert_allclose(
            contents(back)[NAMES].to_numpy(), ROTATION.inverse_transform(ROTATION.transform(X)), rtol=1e-12
        )


def test_missing_values_stay_missing(tmp_path: Path) -> None:
    transform_file(named(SCALER), source(tmp_path, "parquet"), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["b"].null_count == 1
    transform_file(named(SCALER), source(tmp_path, "csv"), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[8].split(",")[2] == ""
    # The only column: a line of nothing would be no row.
    pd.DataFrame({"a": [1.0, np.nan, 3.0]}).to_csv(tmp_path / "one.csv", index=False, na_rep="nan")
    transform_file(StandardScaler().fit([[1.0], [3.0]]), tmp_path / "one.csv", tmp_path / "one-out.csv")
    assert len(pd.read_csv(tmp_path / "one-out.csv", skip_blank_lines=False)) == 3


def test_types_are_kept_and_can_be_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    transform_file(SCALER, tmp_path / "x.npy", tmp_path / "y.npy")
    assert np.load(tmp_path / "y.npy").dtype == np.float32
    transform_file(SCALER, tmp_path / "x.npy", tmp_path / "z.npy", dtype="float64")
    assert np.load(tmp_path / "z.npy").dtype == np.float64
    pq.write_table(pa.table({name: pa.array(X[:, i], pa.float32()) for i, name in enumerate(NAMES)}), tmp_path / "x.pq")
    transform_file(SCALER, tmp_path / "x.pq", tmp_path / "y.parquet")
    assert set(pq.read_schema(tmp_path / "y.parquet").types) == {pa.float32()}
    transform_file(SCALER, tmp_path / "x.pq", tmp_path / "h.csv", dtype="float16")
    assert len(pd.read_csv(tmp_path / "h.csv")) == ROWS
    with pytest.raises(InputError, match="expected dtype to be one of 'float16', 'float32', 'float64', got 'int8'"):
        transform_file(SCALER, tmp_path / "x.npy", tmp_path / "i.npy", dtype="int8")


def test_images_keep_their_axes(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 3, 4, 5), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    scaler = MinMaxScaler(channel_axis=1).fit(images)
    transform_file(scaler, tmp_path / "x.npy", tmp_path / "y.safetensors", dtype="float32", batch_rows=7)
    found = safetensors().load_file(tmp_path / "y.safetensors")["data"]
    np.testing.assert_array_equal(found, scaler.transform(images).astype(np.float32))
    with pytest.raises(ShapeError, match=r"holds samples of shape \(3, 4, 5\), but a csv file has rows of numbers"):
        transform_file(scaler, tmp_path / "x.npy", tmp_path / "y.csv")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["x.npy", "y.safetensors"]


def test_a_column_of_lists_stays_one(tmp_path: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(X.reshape(-1), 3)
    pq.write_table(pa.table({"id": np.arange(ROWS), "embedding": lists}), tmp_path / "x.parquet")
    transform_file(SCALER, tmp_path / "x.parquet", tmp_path / "y.parquet")
    found = pq.read_table(tmp_path / "y.parquet")
    assert found.column_names == ["id", "embedding"]
    np.testing.assert_array_equal(np.stack(found["embedding"].to_pandas()), SCALER.transform(X))


def test_other_arrays_of_an_archive_come_along(tmp_path: Path) -> None:
    for kind in ("npz", "safetensors"):
        transform_file(SCALER, source(tmp_path, kind), tmp_path / f"out.{kind}", columns=["x"])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["y"], np.arange(ROWS))
    import safetensors

    with safetensors.safe_open(tmp_path / "out.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("y"), np.arange(ROWS))
        assert file.metadata() == {"made": "by hand"}


def test_a_folder_becomes_a_folder_of_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "in" / "year=2024").mkdir(parents=True)
    for name, part in (("a.csv", slice(0, 200)), ("year=2024/b.csv", slice(200, 500))):
        frame()[part].to_csv(tmp_path / "in" / name, index=False)
    scaler = named(SCALER)
    done = transform_file(scaler, tmp_path / "in", tmp_path / "out", columns=NAMES)
    assert (done.files, done.rows) == (2, ROWS)
    found = pd.concat([pd.read_csv(tmp_path / "out" / name) for name in ("a.csv", "year=2024/b.csv")])
    np.testing.assert_allclose(found[NAMES], SCALER.transform(X), atol=1e-12)
    done = transform_file(scaler, str(tmp_path / "in" / "*.csv"), tmp_path / "pattern", columns=NAMES)
    assert (done.files, done.rows) == (1, 200)
    with pytest.raises(InputError, match=r"is more than one file, whose results are files of a folder: .*all.csv is"):
        transform_file(scaler, tmp_path / "in", tmp_path / "all.csv")


# Bad input: nothing is written


def test_statistics_of_other_features_are_refused(tmp_path: Path) -> None:
    path = source(tmp_path, "parquet")
    before = sorted(tmp_path.iterdir())
    scaler = StandardScaler().fit(pd.DataFrame(X, columns=["a", "b", "q"]))
    for kind in ("parquet", "csv"):
        with pytest.raises(InputError, match="no column 'q', a feature of the statistics"):
            transform_file(scaler, source(tmp_path, kind), tmp_path / "out.parquet")
    with pytest.raises(InputError, match=r"the statistics are of other features: expected 'q', columns names 'c'"):
        transform_file(scaler, path, tmp_path / "out.parquet", columns=NAMES)
    with pytest.raises(ShapeError, match="statistics are of 3 features without names, and here are 4 columns they may"):
        transform_file(SCALER, path, tmp_path / "out.parquet")
    with pytest.raises(ShapeError, match="2 columns are asked for, the statistics are of 3 features"):
        transform_file(SCALER, path, tmp_path / "out.parquet", columns=["a", "b"])
    np.save(tmp_path / "x.npy", X[:, :2])
    with pytest.raises(ShapeError, match=r"x\.npy: X has 2 features, but StandardScaler is expecting 3 features"):
        transform_file(SCALER, tmp_path / "x.npy", tmp_path / "out.npy")
    assert {item.name for item in tmp_path.iterdir()} - {item.name for item in before} == {"data.csv", "x.npy"}


def test_text_in_a_feature_is_refused(tmp_path: Path) -> None:
    scaler = StandardScaler().fit(pd.DataFrame(X[:, :2], columns=["a", "label"]))
    with pytest.raises(InputError, match="column 'label' holds text, expected numbers"):
        transform_file(scaler, source(tmp_path, "parquet"), tmp_path / "out.parquet")
    (tmp_path / "x.csv").write_text("a,label\n" + "1,2\n" * 700_000 + "3,x\n")
    with pytest.raises(InputError, match=r"x\.csv: row 700000 \(line 700002\), column 'label': expected a number"):
        transform_file(scaler, tmp_path / "x.csv", tmp_path / "out.csv")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["data.parquet", "x.csv"]


def test_an_infinite_value_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    bad = X.copy()
    bad[321, 2] = np.inf
    np.save(tmp_path / "x.npy", bad)
    with pytest.raises(InputError, match=r"x\.npy: Input X contains infinity: row 321, column 2"):
        transform_file(SCALER, tmp_path / "x.npy", tmp_path / "out.npy", batch_rows=100)
    assert [item.name for item in tmp_path.iterdir()] == ["x.npy"]


def test_places_that_make_no_sense(tmp_path: Path) -> None:
    path = source(tmp_path, "npy")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.npy").symlink_to(path)
    for target in (path, tmp_path / "folder" / ".." / "data.npy", tmp_path / "link.npy"):
        with pytest.raises(InputError, match="is the data themselves"):
            transform_file(SCALER, path, target, overwrite=True)
    with pytest.raises(InputError, match=r"the result .*out would lie among the data in "):
        transform_file(SCALER, tmp_path, tmp_path / "folder" / "out")
    np.save(tmp_path / "more.npy", X)
    with pytest.raises(InputError, match=r"the data .*data\.npy lie in "):
        transform_file(SCALER, [path, tmp_path / "more.npy"], tmp_path)
    with pytest.raises(InputError, match=r"two files that would both become 'data\.npy'"):
        transform_file(SCALER, [path, path], tmp_path / "out")
    with pytest.raises(InputError, match=r"cannot tell by its suffix how to write 'out\.xlsx'; known are \.npy"):
        transform_file(SCALER, path, tmp_path / "out.xlsx")
    with pytest.raises(OutputError, match=r"there is no folder .*nowhere, create it first"):
        transform_file(SCALER, path, tmp_path / "nowhere" / "out.npy")
    with pytest.raises(InputError, match="no such file or folder"):
        transform_file(SCALER, tmp_path / "missing.npy", tmp_path / "out.npy")
    (tmp_path / "empty.npy").touch()
    with pytest.raises(InputError, match=r"empty\.npy: the file is empty"):
        transform_file(SCALER, tmp_path / "empty.npy", tmp_path / "out.npy")
    (tmp_path / "head.csv").write_text("a,b,c\n")
    with pytest.raises(InputError, match=r"head\.csv holds no rows"):
        transform_file(SCALER, tmp_path / "head.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.npy").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_there_is_only_replaced_when_asked(tmp_path: Path) -> None:
    path, out = source(tmp_path, "npy"), tmp_path / "out.npy"
    out.write_text("precious")
    with pytest.raises(OutputError, match=r"out\.npy exists already"):
        transform_file(SCALER, path, out)
    assert out.read_text() == "precious"
    transform_file(SCALER, path, out, overwrite=True)
    assert len(np.load(out)) == ROWS
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "x.npy", X)
    folder = tmp_path / "folder"
    folder.mkdir()
    transform_file(SCALER, tmp_path / "in", folder)  # an empty folder is no harm
    (folder / "old").touch()
    with pytest.raises(OutputError, match="folder exists already"):
        transform_file(SCALER, tmp_path / "in", folder)
    transform_file(SCALER, tmp_path / "in", folder, overwrite=True)
    assert [item.name for item in folder.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, replaced: bool, resume: bool) -> None:
    path, out = source(tmp_path, kind), tmp_path / f"out.{kind}"
    if replaced:
        out.write_text("the old one")
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    columns = ["x"] if kind in ("npz", "safetensors") else None
    write = Sink.write

    def full(sink: Sink, block: Any) -> None:
        if sink.rows >= 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(sink, block)

    for base in (AppendingSink, SegmentedSink):
        monkeypatch.setattr(base, "interval", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write", full)
        with pytest.raises(OutputError, match=r"^cannot write .*out\.\w+: No space left on device$"):
            transform_file(estimator, path, out, batch_rows=50, columns=columns, overwrite=replaced, resume=resume)
    assert out.exists() == replaced
    if replaced:
        assert out.read_text() == "the old one"
    assert (tmp_path / f"out.{kind}.partial").exists() == resume
    if resume:
        done = transform_file(estimator, path, out, batch_rows=50, columns=columns, resume=True)
        assert (done.resumed, done.rows) == (220 if kind == "parquet" else 200, ROWS)  # 120 rows are a row group
        transform_file(estimator, path, whole := tmp_path / f"whole.{kind}", batch_rows=50, columns=columns)
        same(out, whole)
        assert not list(tmp_path.glob("*.partial"))


def same(one: Path, other: Path) -> None:
    """Byte for byte."""
    assert one.read_bytes() == other.read_bytes()


# An interrupted transform goes on

KILLED = """
import sys
from batchnorm.preprocessing import load, transform_file
from batchnorm.preprocessing.sinks.sink import AppendingSink
from batchnorm.preprocessing.sinks.tables import SegmentedSink
AppendingSink.interval = SegmentedSink.interval = 0.0
stats, src, dst = sys.argv[1:]
def progress(done, total):
    print(done, flush=True)
    sys.stdin.readline()  # the other end says when to go on, or kills
transform_file(load(stats), src, dst, batch_rows=60, progress=progress)
"""


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stop", [130, 333, 499])
def test_what_a_kill_leaves_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, files: int, stop: int
) -> None:
    for base in (AppendingSink, SegmentedSink):
        monkeypatch.setattr(base, "interval", 0.0)
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    columns = ["x"] if kind in ("npz", "safetensors") else None
    src, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    src.mkdir()
    for number in range(files):
        WRITE[kind](src / f"part-{number}.{kind}")
    work, snapshot = tmp_path / "out.partial", tmp_path / "snapshot"

    def progress(done: int, _: int | None) -> None:
        # What is on the disk in the middle of it all, with what the process has not written yet missing.
        if done >= stop * files:
            shutil.copytree(work, snapshot)
            raise KeyboardInterrupt

    def run(target: Path, **options: Any) -> Any:
        return transform_file(estimator, src, target, columns=columns, batch_rows=60, **options)

    with pytest.raises(KeyboardInterrupt):
        run(out, progress=progress)
    shutil.rmtree(work)
    snapshot.rename(work)
    with pytest.raises(OutputError, match=r"holds an interrupted transform, [0-9,]+ rows of it: go on with it"):
        run(out)
    assert not out.exists()
    done = run(out, resume=True)
    assert done.rows == ROWS * files
    assert (stop - 120) * files <= done.resumed < done.rows
    run(whole)
    for number in range(files):
        same(out / f"part-{number}.{kind}", whole / f"part-{number}.{kind}")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_killed_process_is_gone_on_with(tmp_path: Path, kind: str) -> None:
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    estimator.save(tmp_path / "stats.safetensors")
    src, out, whole = source(tmp_path, kind), tmp_path / f"out.{kind}", tmp_path / f"whole.{kind}"
    words = [sys.executable, "-c", KILLED, str(tmp_path / "stats.safetensors"), str(src), str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdout.readline()
        process.kill()
    assert not out.exists()
    done = transform_file(estimator, src, out, batch_rows=60, resume=True)
    assert done.rows == ROWS
    assert 180 <= done.resumed < ROWS
    transform_file(estimator, src, whole, batch_rows=60)
    same(out, whole)


def interrupt_after(rows: int) -> Callable[[int, int | None], None]:
    def progress(done: int, total: int | None) -> None:
        assert total in (ROWS, None)
        if done >= rows:
            raise KeyboardInterrupt

    return progress


def test_an_interrupt_keeps_what_is_done_even_between_checkpoints(tmp_path: Path, kind: str) -> None:
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    columns = ["x"] if kind in ("npz", "safetensors") else None
    path, out = source(tmp_path, kind), tmp_path / f"out.{kind}"
    with pytest.raises(KeyboardInterrupt):
        transform_file(estimator, path, out, batch_rows=100, columns=columns, progress=interrupt_after(200))
    done = transform_file(estimator, path, out, batch_rows=100, columns=columns, resume=True)
    assert done.resumed >= 200
    transform_file(estimator, path, tmp_path / f"whole.{kind}", batch_rows=100, columns=columns)
    same(out, tmp_path / f"whole.{kind}")


def test_a_transform_only_goes_on_as_the_same(tmp_path: Path) -> None:
    path, out = source(tmp_path, "npy"), tmp_path / "out.npy"

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            transform_file(SCALER, path, out, batch_rows=100, progress=interrupt_after(200), overwrite=True)

    interrupted()
    with pytest.raises(InputError, match=r"cannot go on with .*: the statistics are others"):
        transform_file(StandardScaler().fit(X + 1), path, out, batch_rows=100, resume=True)
    with pytest.raises(InputError, match="the options are others"):
        transform_file(SCALER, path, out, batch_rows=100, resume=True, dtype="float32")
    with pytest.raises(InputError, match="batch_rows is another"):
        transform_file(SCALER, path, out, batch_rows=101, resume=True)
    later = time.time() + 5
    os.utime(path, (later, later))
    with pytest.raises(InputError, match="the data have changed"):
        transform_file(SCALER, path, out, batch_rows=100, resume=True)
    # It is still there, and can be begun anew.
    assert (tmp_path / "out.npy.partial" / "manifest.json").exists()
    done = transform_file(SCALER, path, out, batch_rows=100, overwrite=True)
    assert done.resumed == 0
    assert not (tmp_path / "out.npy.partial").exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    path = source(tmp_path, "npy")
    work = tmp_path / "out.npy.partial"
    work.mkdir()
    (work / "thesis.tex").write_text("years")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="is in the way, and no interrupted transform"):
            transform_file(SCALER, path, tmp_path / "out.npy", **options)  # type: ignore[arg-type]
    (work / "manifest.json").write_text(json.dumps({"format": "batchnorm.transform", "version": 99}))
    with pytest.raises(InputError, match="is in the way"):
        transform_file(SCALER, path, tmp_path / "out.npy", overwrite=True)
    assert (work / "thesis.tex").read_text() == "years"


def test_resuming_nothing_is_beginning(tmp_path: Path) -> None:
    path = source(tmp_path, "npy")
    (tmp_path / "out.npy.partial").mkdir()  # killed in the first millisecond
    assert transform_file(SCALER, path, tmp_path / "out.npy", resume=True).resumed == 0


def test_a_table_without_rows_in_a_folder_is_one_there_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.Table.from_pandas(frame(), preserve_index=False)
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "in" / "b.parquet")
    assert transform_file(named(SCALER), tmp_path / "in", tmp_path / "out").rows == ROWS
    found = pq.read_table(tmp_path / "out" / "b.parquet")
    assert (len(found), found.column_names) == (0, ["id", *NAMES, "label"])


def test_a_column_with_the_name_of_a_result_is_refused(tmp_path: Path) -> None:
    data = frame().rename(columns={"id": "whitener1"})
    data.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="has a column 'whitener1' that is no feature, and a result has this name too"):
        transform_file(named(ROTATION), tmp_path / "x.parquet", tmp_path / "y.parquet")
    transform_file(named(ROTATION), tmp_path / "x.parquet", tmp_path / "y.parquet", keep_columns=False)
    assert pq.read_schema(tmp_path / "y.parquet").names == ["whitener0", "whitener1"]


def test_what_a_format_cannot_hold_is_said(tmp_path: Path) -> None:
    table = pa.table({name: X[:, i] for i, name in enumerate(NAMES)} | {"tags": [[1, 2]] * ROWS})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"cannot write the columns of .*x\.parquet as csv: "):
        transform_file(named(SCALER), tmp_path / "x.parquet", tmp_path / "y.csv")
