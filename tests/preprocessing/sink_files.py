"""One set of data as a file of every kind, and those files read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.preprocessing import StandardScaler, Whitener

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


def same(one: Path, other: Path) -> None:
    """Byte for byte."""
    assert one.read_bytes() == other.read_bytes()


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
