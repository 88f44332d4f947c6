"""What comes in goes out: NumPy, torch, pandas, polars; dtypes, indices, names, set_output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from batchnorm import DtypeError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(),
    MinMaxScaler(),
    Whitener("pca"),
    Whitener("zca"),
    Whitener("cholesky"),
]
X = np.random.default_rng(0).standard_normal((30, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.2], [0, 0, 2.0]]) + 3


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestContainers:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_torch(self, estimator: Any, dtype: torch.dtype) -> None:
        x = torch.tensor(X, dtype=dtype)
        y = estimator.fit(x).transform(x)
        assert isinstance(y, torch.Tensor)
        assert y.dtype == dtype
        reference = estimator.fit(x.double().numpy()).transform(x.double().numpy())
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(y.double().numpy(), reference, rtol=eps, atol=eps)
        back = estimator.inverse_transform(y)
        assert back.dtype == dtype
        np.testing.assert_allclose(back.double().numpy(), x.double().numpy(), atol=40 * eps)

    def test_integers_become_floats(self, estimator: Any) -> None:
        x = np.random.default_rng(0).integers(0, 255, (20, 3)).astype(np.uint8)
        expected = estimator.fit(x.astype(float)).transform(x.astype(float))
        y = estimator.fit(x).transform(x)
        assert y.dtype == np.float64
        np.testing.assert_array_equal(y, expected)
        tensor = estimator.transform(torch.from_numpy(x))
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), expected.astype(np.float32))

    def test_pandas_keeps_its_index(self, estimator: Any) -> None:
        frame = pd.DataFrame(X, columns=["a", "b", "c"], index=pd.date_range("2020", periods=30))
        y = estimator.fit(frame).transform(frame)
        assert isinstance(y, pd.DataFrame)
        assert (y.index == frame.index).all()
        assert list(y.columns) == list(estimator.get_feature_names_out())
        np.testing.assert_allclose(y.to_numpy(), estimator.fit(X).transform(X), rtol=1e-11, atol=1e-13)
        estimator.fit(frame)
        back = estimator.inverse_transform(y)
        pd.testing.assert_frame_equal(back, frame, check_freq=False)

    def test_polars(self, estimator: Any) -> None:
        frame = pl.DataFrame(X, schema=["a", "b", "c"])
        y = estimator.fit(frame).transform(frame)
        assert isinstance(y, pl.DataFrame)
        assert y.columns == list(estimator.get_feature_names_out())
        back = estimator.inverse_transform(y)
        assert back.columns == ["a", "b", "c"]
        np.testing.assert_allclose(back.to_numpy(), X, rtol=1e-12)

    def test_set_output_decides(self, estimator: Any) -> None:
        frame = pd.DataFrame(X, columns=["a", "b", "c"])
        plain = clone(estimator).set_output(transform="default").fit(frame)
        assert isinstance(plain.transform(frame), np.ndarray)
        into_polars = clone(estimator).set_output(transform="polars").fit(frame)
        assert isinstance(into_polars.transform(frame), pl.DataFrame)
        tensor = clone(estimator).set_output(transform="pandas").fit_transform(torch.from_numpy(X))
        assert isinstance(tensor, pd.DataFrame)
        np.testing.assert_allclose(tensor.to_numpy(), plain.transform(frame), rtol=1e-11, atol=1e-13)


def test_missing_values_of_nullable_frames() -> None:
    values = pd.array([1, 2, None], dtype="Int64")
    frame = pd.DataFrame({"a": values, "b": [1.0, 2.0, 4.0]}, index=[7, 8, 9])
    y = StandardScaler().fit_transform(frame)
    np.testing.assert_allclose(y["a"], [-1, 1, np.nan])
    assert list(y.index) == [7, 8, 9]
    polar = StandardScaler().fit_transform(pl.DataFrame({"a": [1, 2, None], "b": [1.0, 2.0, 4.0]}))
    np.testing.assert_allclose(polar["a"].to_numpy(), [-1, 1, np.nan])


def test_none_in_a_list_is_missing() -> None:
    np.testing.assert_allclose(StandardScaler().fit_transform([[None, 1], [2, 3], [4, 5]])[:, 0], [np.nan, -1, 1])


def test_a_frame_of_other_columns_is_refused_and_a_tensor_only_warned_of() -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    fitted = StandardScaler().fit(frame)
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.transform(frame[["b", "a", "c"]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        fitted.transform(torch.from_numpy(X))


def test_frames_of_three_axes_do_not_exist() -> None:
    scaler = StandardScaler(channel_axis=1).set_output(transform="pandas")
    with pytest.raises(ShapeError, match=r"set_output\(transform='pandas'\) needs 2-D results, got shape \(2, 3, 4\)"):
        scaler.fit_transform(np.random.default_rng(0).random((2, 3, 4)))


def test_sparse_is_refused() -> None:
    with pytest.raises(DtypeError, match=r"Sparse data was passed as a tensor of torch.sparse_coo: .* X.to_sparse_csr"):
        StandardScaler(with_mean=False).fit(torch.eye(3).to_sparse())


def test_memory_maps(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for estimator in ESTIMATORS:
        np.testing.assert_array_equal(estimator.fit(mapped).transform(mapped), estimator.fit(X).transform(X))


def test_inside_pipelines_searches_and_column_transformers() -> None:
    y = (X[:, 0] > 3).astype(int)
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Whitener(), LogisticRegression()),
        {"whitener__method": ["pca", "zca-cor"], "whitener__n_components": [1, None]},
        cv=3,
    ).fit(frame, y)
    assert search.best_score_ > 0.7
    columns = ColumnTransformer([("s", StandardScaler(), ["a"]), ("m", MinMaxScaler(), ["b", "c"])]).fit(frame)
    expected = np.c_[StandardScaler().fit_transform(X[:, :1]), MinMaxScaler().fit_transform(X[:, 1:])]
    np.testing.assert_allclose(columns.transform(frame), expected, rtol=1e-12)
