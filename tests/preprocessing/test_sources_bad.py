"""Bad files: one line that names the file, and the column and row where there are any; the estimator as it was."""

from __future__ import annotations

import gc
import gzip
import json
import re
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from batchnorm._errors import BatchnormError, InputError, MissingDependencyError, ShapeError
from batchnorm.preprocessing import StandardScaler
from batchnorm.preprocessing.sources import open_source

X = np.random.default_rng(0).normal(size=(300, 2))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batchnorm-")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()


def refused(X: Any, text: str, **options: Any) -> None:
    """Fitting raises one line that begins with ``text``, and leaves the estimator as it was."""
    scaler = StandardScaler().fit(np.arange(6.0).reshape(3, 2))
    before = dict(vars(scaler))
    with pytest.raises(BatchnormError) as caught:
        scaler.fit(open_source(X, **options))
    assert "\n" not in str(caught.value)
    assert re.match(re.escape(text), str(caught.value)), str(caught.value)
    assert vars(scaler) == before


def frame(**columns: Any) -> pa.Table:
    return pa.table({"a": X[:, 0], "b": X[:, 1], **columns})


def test_nothing_there() -> None:
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/readme.txt").touch()
    np.save("data.npy", X)
    refused("dato.npy", "no such file or folder: 'dato.npy'; did you mean 'data.npy'?")
    refused("*.parquet", "no file matches '*.parquet'")
    refused("empty", "empty: no file of a known kind in this folder, nothing")
    refused("other", "other: no file of a known kind in this folder, only 'readme.txt'")
    refused(
        "other/readme.txt", "other/readme.txt: cannot tell by its suffix how to read it; known are .arrow .bmp .csv"
    )
    pq.write_table(frame(), "data.parquet")
    refused("data.*", "data.*: holds files of different kinds (data.npy, data.parquet): choose some by a pattern")


@pytest.mark.parametrize(
    "name", ["x.npy", "x.npz", "x.parquet", "x.arrow", "x.csv", "x.csv.gz", "x.safetensors", "x.png", "x.jpg"]
)
def test_empty_and_foreign_files(name: str) -> None:
    Path(name).touch()
    refused(name, f"{name}: the file is empty (0 bytes)")
    if name != "x.csv":
        Path(name).write_bytes(b"this is not what it should be" * 30)
        refused(name, f"{name}: cannot be read as ")


def test_files_that_were_cut_off() -> None:
    np.save("x.npy", X)
    np.save("f.npy", np.asfortranarray(X))
    np.savez("x.npz", x=X)
    pq.write_table(frame(), "x.parquet", row_group_size=100)
    pa.feather.write_feather(frame(), "x.arrow")
    save_file({"x": torch.from_numpy(X)}, "x.safetensors")
    text = "a,b\n" + "\n".join(f"{a},{b}" for a, b in X) + "\n"
    Path("x.csv.gz").write_bytes(gzip.compress(text.encode()))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save("x.png")
    for path in Path().iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refused("x.npy", "x.npy: cannot be read as a NumPy array: it ends in row 197 of 300: the file was cut off")
    refused("f.npy", "f.npy: cannot be read as a NumPy array: it is shorter than its head says: the file was cut off")
    refused("x.npz", "x.npz: cannot be read as an archive of NumPy arrays: File is not a zip file")
    refused("x.parquet", "x.parquet: cannot be read as Parquet: ")
    refused("x.arrow", "x.arrow: cannot be read as Arrow: ")
    refused("x.csv.gz", "x.csv.gz: ")
    refused("x.safetensors", "x.safetensors: cannot be read as safetensors: ")
    refused("x.png", "x.png: cannot be read as an image: ")


def test_a_damaged_page_is_found_when_it_is_reached() -> None:
    pq.write_table(frame(), "x.parquet", row_group_size=100, compression="zstd", write_page_checksum=True)
    data = bytearray(Path("x.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    Path("x.parquet").write_bytes(data)
    refused("x.parquet", "x.parquet: cannot be read as Parquet: ")


def test_arrays_that_are_none_of_numbers() -> None:
    np.save("text.npy", np.array([["a", "b"]]))
    np.save("objects.npy", np.array([[None, {}]]), allow_pickle=True)
    np.save("complex.npy", np.ones((2, 2), complex))
    np.save("one.npy", np.float64(3))
    np.save("flat.npy", np.ones(3))
    refused("text.npy", "text.npy: holds <U1, expected real numbers")
    refused("objects.npy", "objects.npy: holds object, expected real numbers")
    refused("complex.npy", "complex.npy: holds complex128, expected real numbers")
    refused("one.npy", "one.npy: holds a single number, expected an array (n, features)")
    refused("flat.npy", "flat.npy: Expected 2D array, got 1D array instead.")
    np.savez("x.npz", text=np.array(["a"]))
    refused("x.npz", "x.npz: text: holds <U1, expected real numbers")


def test_archives_and_their_arrays() -> None:
    np.savez("x.npz", train=X, test=X, w=np.ones(10))
    refused("x.npz", "x.npz: holds 3 arrays, 'train', 'test', 'w': choose one with columns=NAME")
    refused("x.npz", "x.npz: no array 'trian': did you mean 'train'?", columns="trian")
    refused("x.npz", "x.npz: 'w', the weights, must have shape (300,), one a sample", columns="train", weights="w")
    refused("x.npz", "x.npz: columns names the one array that holds the data, got 't', 'u'", columns=["t", "u"])
    save_file({"x": torch.from_numpy(X), "y": torch.ones(3)}, "x.safetensors")
    refused("x.safetensors", "x.safetensors: holds 2 arrays, 'x', 'y': choose one with columns=NAME")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_that_are_no_numbers(suffix: str) -> None:
    name = f"x.{suffix}"
    write = pq.write_table if suffix == "parquet" else pa.feather.write_feather
    write(frame(city=["Oslo"] * 300), name)
    refused(name, f"{name}: column 'city' holds text, expected numbers: choose with columns=, numbers are in 'a', 'b'")
    assert StandardScaler().fit(open_source(name, columns=["a", "b"])).n_samples_seen_ == 300
    refused(name, f"{name}: no column 'aa': did you mean 'a'?", columns="aa")
    refused(name, f"{name}: no column 'weight': there are 'a', 'b', 'city'", weights="weight")
    write(frame(city=pa.array(["Oslo"] * 300).dictionary_encode()), name)
    refused(name, f"{name}: column 'city' holds text, expected numbers")
    write(frame(day=pa.array([0] * 300, pa.date32())), name)
    refused(name, f"{name}: column 'day' holds date32[day], expected numbers")
    write(frame(e=[[1.0, 2.0]] * 300), name)
    refused(name, f"{name}: column 'e' holds lists, which are a batch by themselves: choose either it alone with")
    write(pa.table({"e": [[1.0, 2.0]] * 200 + [[1.0]] + [[1.0, 2.0]] * 99}), name)
    refused(name, f"{name}: row 200, column 'e': a list of 1 numbers, expected 2 as in the rows before")
    write(frame(w=np.where(np.arange(300) == 250, -1.0, 1.0)), name)
    refused(name, f"{name}: sample_weight must be finite and not negative, got -1.0 for row 250", weights="w")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_columns_that_change_between_files(suffix: str) -> None:
    write: Any = pq.write_table if suffix == "parquet" else pa.csv.write_csv
    write(frame(), f"1.{suffix}")
    write(frame().select(["a"]), f"2.{suffix}")
    refused(f"*.{suffix}", f"2.{suffix}: no column 'b', which 1.{suffix} has")
    write(frame(z=X[:, 0]), f"2.{suffix}")
    refused(f"*.{suffix}", f"2.{suffix}: column 'z' is not in 1.{suffix}: choose those of both with columns=")
    assert StandardScaler().fit(open_source(f"*.{suffix}", columns=["a"])).n_samples_seen_ == 600
    write(pa.table({"a": X[:, 0], "b": ["x"] * 300}), f"2.{suffix}")
    where = "2.parquet: column 'b' holds text" if suffix == "parquet" else "2.csv: row 0 (line 2), column 'b': expected"
    refused(f"*.{suffix}", where)


def test_widths_that_change_between_files() -> None:
    np.save("1.npy", X)
    np.save("2.npy", X[:, :1])
    refused("*.npy", "2.npy: X has 1 features, but StandardScaler is expecting 2 features as input")


@pytest.mark.parametrize("suffix", ["npy", "parquet", "csv", "safetensors"])
def test_infinite_values(suffix: str) -> None:
    bad = X.astype(np.float16)
    bad[251, 1] = np.inf  # as a number too large for float16 becomes
    name = f"x.{suffix}"
    table = pa.table({"a": bad[:, 0], "b": bad[:, 1]})
    write: dict[str, Any] = {
        "npy": lambda: np.save(name, bad),
        "parquet": lambda: pq.write_table(table, name),
        "csv": lambda: pa.csv.write_csv(table.cast(pa.schema([("a", "float64"), ("b", "float64")])), name),
        "safetensors": lambda: save_file({"x": torch.from_numpy(bad)}, name),
    }
    write[suffix]()
    column = "column 1 ('b')" if suffix in ("parquet", "csv") else "column 1"
    refused(name, f"{name}: Input X contains infinity: row 251, {column}; remove the row", batch_rows=100)


def test_lines_of_text_that_are_not_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.preprocessing.sources.delimited._BLOCK_BYTES", 1000)
    lines = [f"{a},{b}" for a, b in X]

    def write(*changed: tuple[int, str], header: str = "a,b") -> None:
        body = list(lines)
        for row, line in changed:
            body[row] = line
        Path("x.csv").write_text("\n".join([header, *body]) + "\n")

    write((1, "3,4"), (280, "1,two"))
    refused("x.csv", "x.csv: row 280 (line 282), column 'b': expected a number, got 'two'; mend it, or choose other")
    assert StandardScaler().fit(open_source("x.csv", columns="a")).n_samples_seen_ == 300
    write((290, "1,2,3"))
    refused("x.csv", "x.csv: row 290 (line 292): 3 fields, expected 2 as the first line has")
    write((3, "1"))
    refused("x.csv", "x.csv: row 3 (line 5): 1 fields, expected 2 as the first line has")
    write((0, "1,two"))
    refused("x.csv", "x.csv: row 0 (line 2), column 'b': expected a number, got 'two'")
    write(*((row, "1,2020-01-01") for row in range(300)))
    refused("x.csv", "x.csv: column 'b' holds date32[day], expected numbers")
    write(header="1.5,2.5")
    refused("x.csv", "x.csv: the first line holds numbers (1.5,2.5...), expected the names of the columns")
    write(header=",b")
    refused("x.csv", "x.csv: column 0 has no name (an index?): choose the features with columns=")
    write(header="a,a")
    refused("x.csv", "x.csv: has 2 columns named 'a': rename them")
    write()
    refused("x.csv", "x.csv: no column 'c': there are 'a', 'b'", columns="c")
    Path("x.csv").write_text("a,b\n")
    refused("x.csv", "Found no samples in x.csv: 0 sample(s) while a minimum of 1 is required.")


def test_text_may_look_like_much() -> None:
    text = 'flag,"a, b",n,empty,note\ntrue,1,7,,"two\nlines"\n,NA,8,,x\nFALSE,"2.5",9.5,,\n'
    Path("x.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    part = next(iter(open_source("x.csv", columns=["flag", "a, b", "n", "empty"])))
    nan = np.nan
    np.testing.assert_array_equal(part.values, [[1, 1, 7, nan], [nan, nan, 8, nan], [0, 2.5, 9.5, nan]])


def test_images() -> None:
    Image.new("RGB", (4, 4)).save("a.png")
    refused("a.png", "a.png: Expected 2D array, got 4D array instead. Reshape your data")
    with pytest.raises(ShapeError, match=r"or pass channel_axis=1 for data of shape \(N, C, \*\)$"):
        StandardScaler().fit("a.png")
    refused("a.png", "columns of images is the mode to convert them to, one of L, LA, RGB, RGBA", columns="HSV")
    refused("a.png", "a.png: images have no column 'w' with weights: pass sample_weight", weights="w")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"columns": []}, "columns is empty"),
        ({"columns": ["a", "a"]}, "columns names 'a' twice"),
        ({"columns": ["a", "w"], "weights": "w"}, "column 'w' cannot be both a feature and the weights"),
        ({"batch_rows": 0}, "batch_rows must be a positive integer, got 0"),
        ({"batch_rows": 2.5}, r"batch_rows must be a positive integer, got 2\.5"),
    ],
)
def test_options_that_make_no_sense(options: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_source("x.npy", **options)


@pytest.mark.parametrize(
    ("name", "module", "package"), [("x.parquet", "pyarrow.parquet", "pyarrow"), ("x.png", "PIL.Image", "pillow")]
)
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
    Path(name).write_bytes(b"data")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}: pip install 'batchnorm\[files\]'"):
        StandardScaler(channel_axis=1).fit(name)


def test_a_header_that_lies() -> None:
    head = json.dumps({"x": {"dtype": "F64", "shape": [10, 2], "data_offsets": [0, 16]}}).encode()
    Path("x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    refused("x.safetensors", "x.safetensors: cannot be read as safetensors: ")
    save_file({"x": torch.zeros(3, 2, dtype=torch.complex64)}, "x.safetensors")
    refused("x.safetensors", "x.safetensors: 'x' holds C64, expected real numbers")


@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "x.csv", "x.npz", "x.arrow", "x.png"])
def test_stopping_early_closes_files_and_ends_threads(name: str) -> None:
    for number in range(6):
        Path(str(number)).mkdir()
        path = f"{number}/{name}"
        {
            "npy": lambda p: np.save(p, X),
            "npz": lambda p: np.savez(p, x=X),
            "parquet": lambda p: pq.write_table(frame(), p),
            "arrow": lambda p: pa.feather.write_feather(frame(), p),
            "csv": lambda p: pa.csv.write_csv(frame(), p),
            "png": lambda p: Image.new("L", (3 + int(p[0]), 3)).save(p),
        }[name.rpartition(".")[2]](path)
    stream = iter(open_source(f"*/{name}", batch_rows=10))
    assert next(stream).rows in (10, 1)
    stream.close()  # type: ignore[attr-defined]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    scaler = StandardScaler(channel_axis=1 if name == "x.png" else None)
    with pytest.raises(KeyboardInterrupt):
        scaler.fit(open_source(f"*/{name}", batch_rows=10, progress=interrupt))
    assert not hasattr(scaler, "mean_")


def test_a_feature_without_a_value_is_named() -> None:
    pq.write_table(frame(z=pa.nulls(300)), "x.parquet")
    with pytest.warns(RuntimeWarning, match="StandardScaler saw only NaN in feature 'z': its statistics are NaN"):
        scaler = StandardScaler().fit("x.parquet")
    assert np.isnan(scaler.mean_).tolist() == [False, False, True]
