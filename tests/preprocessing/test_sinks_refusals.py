"""transform_file and bad input: one line that says what, and nothing half-written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm._errors import InputError, OutputError, ShapeError
from batchnorm.preprocessing import StandardScaler, transform_file
from batchnorm.preprocessing.sinks.sink import AppendingSink, Sink
from batchnorm.preprocessing.sinks.tables import SegmentedSink
from preprocessing.sink_files import (
    ARRAYS,
    NAMES,
    ROTATION,
    ROWS,
    SCALER,
    WRITE,
    X,
    frame,
    named,
    pa,
    pd,
    pq,
    same,
    source,
)


@pytest.fixture(params=sorted(WRITE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


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
