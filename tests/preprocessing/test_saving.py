"""save and load: the same estimator again, going on where it stopped; damaged and foreign files; places unwritable."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from batchnorm import InputError, OutputError, StatisticsFileError, preprocessing
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener, load
from batchnorm.preprocessing.base import Normalizer
from batchnorm.preprocessing.saving import SAVED_CLASSES, from_bytes, to_bytes

X = np.random.default_rng(0).standard_normal((40, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.2], [0, 0, 2.0]]) + 1e4
ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(with_mean=False),
    MinMaxScaler((0, 2), clip=True),
    *(Whitener(method) for method in ("pca", "zca", "cholesky", "pca-cor", "zca-cor")),
    Whitener("zca", n_components=0.9, shrinkage="ledoit-wolf", eps=1e-3, tol=1e-8),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_round_trip_and_going_on(estimator: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    fitted = clone(estimator).fit(frame.iloc[:20], sample_weight=np.arange(20) + 0.5)
    path = tmp_path / "stats.safetensors"
    fitted.save(path)
    assert os.listdir(tmp_path) == ["stats.safetensors"]
    again = load(str(path))
    assert type(again) is type(fitted)
    assert again.get_params() == fitted.get_params()
    pd.testing.assert_frame_equal(again.transform(frame), fitted.transform(frame), rtol=0, atol=0)
    for name, value in vars(fitted).items():
        if name.endswith("_"):
            np.testing.assert_array_equal(getattr(again, name), value)
    fitted.partial_fit(frame.iloc[20:])
    again.merge(clone(estimator).partial_fit(frame.iloc[20:]))
    expected = fitted.transform(frame).to_numpy()
    np.testing.assert_allclose(again.transform(frame).to_numpy(), expected, rtol=1e-7, atol=1e-9)
    again.save(path)
    np.testing.assert_array_equal(load(path).transform(frame), again.transform(frame))


def test_what_the_file_holds_is_open_to_read(tmp_path: Path) -> None:
    StandardScaler().fit(X).save(tmp_path / "s")
    with safetensors.safe_open(tmp_path / "s", "pt") as file:
        header = json.loads(file.metadata()["batchnorm.preprocessing"])
        assert header["estimator"] == "StandardScaler"
        np.testing.assert_array_equal(file.get_tensor("mean").numpy(), StandardScaler().fit(X).mean_)
    assert b"pickle" not in (tmp_path / "s").read_bytes()


def damaged(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "cut by one byte":
        data = data[:-1]
    elif kind == "empty":
        data = bytearray()
    elif kind == "one bit in a tensor":
        data[-3] ^= 1
    elif kind == "a pickle":
        data = bytearray(pickle.dumps({"mean": 1}))
    elif kind == "text":
        data = bytearray(b"mean,var\n1,2\n" * 20)
    elif kind == "foreign":
        data = bytearray(safetensors.torch.save({"weight": torch.ones(3)}, {"format": "pt"}))
    elif kind == "no metadata":
        data = bytearray(safetensors.torch.save({"weight": torch.ones(3)}))
    elif kind == "another feature name":
        data = bytearray(bytes(data).replace(b"alpha", b"omega"))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("truncated", "is truncated, damaged or no safetensors file"),
        ("cut by one byte", "is truncated, damaged or no safetensors file"),
        ("empty", "is truncated, damaged or no safetensors file"),
        ("one bit in a tensor", "is damaged, its contents do not match their digest"),
        ("a pickle", "is truncated, damaged or no safetensors file"),
        ("text", "is truncated, damaged or no safetensors file"),
        ("foreign", "holds no statistics of batchnorm.preprocessing"),
        ("no metadata", "holds no statistics of batchnorm.preprocessing"),
        ("another feature name", "is damaged, its contents do not match their digest"),
    ],
)
def test_damaged_files(kind: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    StandardScaler().fit(pd.DataFrame(X, columns=["alpha", "b", "c"])).save(path)
    damaged(kind, path)
    with pytest.raises(StatisticsFileError, match=text) as caught:
        load(path)
    assert "stats" in str(caught.value)
    assert "\n" not in str(caught.value)


def rewritten(path: Path, change: dict[str, Any]) -> None:
    from batchnorm.preprocessing.saving import _digest

    tensors = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["batchnorm.preprocessing"])
    header.update(change)
    text = json.dumps(header)
    path.write_bytes(
        safetensors.torch.save(tensors, {"batchnorm.preprocessing": text, "sha256": _digest(text, tensors)})
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "is of version 2 of the format, this package reads 1"),
        ({"estimator": "Normalizer"}, "holds a 'Normalizer', expected one of"),
        ({"estimator": "Whitener", "parameters": {}}, "does not describe a fitted estimator"),
        (
            {"estimator": "MinMaxScaler", "parameters": {}},
            "does not describe a fitted estimator: Extrema need the tensors",
        ),
        ({"parameters": {"nonsense": 1}}, "does not describe a fitted estimator"),
        ({"features": 5}, "does not describe a fitted estimator"),
        ({"parameters": None}, "does not describe a fitted estimator"),
        ({"feature_names": 3}, "does not describe a fitted estimator"),
        ({"estimator": ["StandardScaler"]}, r"holds a \['StandardScaler'\], expected one of"),
    ],
)
def test_whole_files_of_something_else(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "stats"
    StandardScaler().fit(X).save(path)
    rewritten(path, change)
    with pytest.raises(StatisticsFileError, match=text):
        load(path)


def test_missing_file_and_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(
        StatisticsFileError, match=r"cannot read the statistics file '.*none': No such file or directory"
    ):
        load(tmp_path / "none")
    scaler = StandardScaler().fit(X)
    with pytest.raises(OutputError, match=r"cannot write the statistics to '.*': No such file or directory"):
        scaler.save(tmp_path / "no" / "folder")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match=r"cannot write the statistics to '.*taken': Is a directory"):
        scaler.save(tmp_path / "taken")
    assert os.listdir(tmp_path) == ["taken"]
    with pytest.raises(NotFittedError):
        StandardScaler().save(tmp_path / "x")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats"
    StandardScaler().fit(X).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        StandardScaler().fit(X + 1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["stats"]


def test_bytes_are_what_the_file_holds(tmp_path: Path) -> None:
    fitted = StandardScaler().fit(X)
    fitted.save(tmp_path / "stats")
    data = (tmp_path / "stats").read_bytes()
    for written in (data, to_bytes(fitted)):  # safetensors orders its metadata as it likes
        np.testing.assert_array_equal(from_bytes(written, "stats").transform(X), fitted.transform(X))
    with pytest.raises(StatisticsFileError, match=r"^an attachment is truncated, damaged or no safetensors file"):
        from_bytes(data[:-1], "an attachment")


def test_every_class_with_a_name_here_can_be_saved() -> None:
    classes = {name for name in preprocessing.__all__ if isinstance(getattr(preprocessing, name), type)}
    assert {name for name in classes if issubclass(getattr(preprocessing, name), Normalizer)} == set(SAVED_CLASSES)


def test_a_class_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    for name in ("Doubler", "StandardScaler"):
        kind = type(name, (StandardScaler,), {"__init__": StandardScaler.__init__})
        with pytest.raises(InputError, match=rf"cannot save a {name} of .*: expected one of \['CORAL', 'Me"):
            kind().fit(X).save(tmp_path / "stats")
    assert os.listdir(tmp_path) == []


def test_parameters_of_numpys_types(tmp_path: Path) -> None:
    scaler = MinMaxScaler((np.float32(0), np.int64(2)), clip=np.bool_(True)).fit(X)
    scaler.save(tmp_path / "stats")
    assert load(tmp_path / "stats").get_params() == scaler.get_params()
