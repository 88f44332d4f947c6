"""transform_file: every kind of file in and out, by blocks, with the columns that are no features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batchnorm._errors import InputError, ShapeError
from batchnorm.preprocessing import MinMaxScaler, StandardScaler, transform_file
from preprocessing.sink_files import (
    ARRAYS,
    NAMES,
    ROTATION,
    ROWS,
    SCALER,
    WRITE,
    X,
    contents,
    frame,
    named,
    pa,
    pd,
    pq,
    safetensors,
    source,
)


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


def test_a_table_without_rows_in_a_folder_is_one_there_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.Table.from_pandas(frame(), preserve_index=False)
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "in" / "b.parquet")
    assert transform_file(named(SCALER), tmp_path / "in", tmp_path / "out").rows == ROWS
    found = pq.read_table(tmp_path / "out" / "b.parquet")
    assert (len(found), found.column_names) == (0, ["id", *NAMES, "label"])
