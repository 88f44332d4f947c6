"""pandas, polars and pyarrow in their many types of columns: numbers are read, all else is refused by its name."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

VALUES = np.array([[1.0, 2.0], [np.nan, 5.0], [4.0, 9.0]])
DAY = date(2020, 1, 1)


def arrow(**columns: Any) -> Any:
    return pa.table(columns)


def pandas_of(dtype: Any) -> Any:
    columns = {"a": [1, None, 4], "b": [2, 5, 9]}
    return pd.DataFrame({name: pd.array(values, dtype=dtype) for name, values in columns.items()})


FRAMES = {
    "arrow": arrow(a=[1.0, None, 4.0], b=[2, 5, 9]),
    "arrow chunks": pa.concat_tables(
        [
            arrow(a=[1.0], b=[2]),
            arrow(a=[None, 4.0], b=[5, 9]).cast(pa.schema([("a", pa.float64()), ("b", pa.int64())])),
        ]
    ),
    "arrow batch": pa.record_batch({"a": [1.0, None, 4.0], "b": [Decimal(2), Decimal(5), Decimal(9)]}),
    "polars": pl.DataFrame({"a": [1, None, 4], "b": [Decimal(2), Decimal(5), Decimal(9)]}),
    "polars floats": pl.DataFrame({"a": [1.0, None, 4.0], "b": [2.0, 5.0, 9.0]}),
    "Int64": pandas_of("Int64"),
    "UInt8": pandas_of("UInt8"),
    "Float64": pandas_of("Float64"),
    "arrow-backed": pandas_of("double[pyarrow]"),
    "arrow-backed integers": pandas_of("int32[pyarrow]"),
    "arrow-backed decimals": pd.DataFrame(
        {"a": [Decimal(1), None, Decimal(4)], "b": [Decimal(2), Decimal(5), Decimal(9)]},
        dtype=pd.ArrowDtype(pa.decimal128(5, 2)),
    ),
    "objects": pd.DataFrame({"a": np.array([1, None, 4.0], dtype=object), "b": [2, 5, 9]}),
    "mixed": pd.DataFrame({"a": pd.array([1, None, 4], dtype="Int64"), "b": np.array([2, 5, 9], dtype=np.float32)}),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_every_kind_of_number_and_of_missing_value(kind: str) -> None:
    frame = FRAMES[kind]
    for estimator in (StandardScaler(), MinMaxScaler(), MeanSubtractor(), Whitener("zca")):
        y = estimator.fit(frame).transform(frame)
        assert type(y) is type(frame)
        expected = type(estimator)(**estimator.get_params()).fit(VALUES).transform(VALUES)
        columns = [np.asarray(y[name]) for name in ("a", "b")]
        np.testing.assert_allclose(np.stack(columns, axis=1), expected, rtol=1e-12, atol=1e-14)
        assert list(estimator.feature_names_in_) == ["a", "b"]
        back = estimator.inverse_transform(y)
        assert type(back) is type(frame)
        rows = 2 if isinstance(estimator, Whitener) else slice(None)  # a sample with a hole comes back as NaN
        np.testing.assert_allclose(np.asarray(back["a"])[rows], VALUES[rows, 0], rtol=1e-12)


@pytest.mark.parametrize(
    ("frame", "dtype"),
    [
        (arrow(a=pa.array([1, 2, 4], pa.float32()), b=pa.array([1, None, 4], pa.float32())), np.float32),
        (arrow(a=pa.array(np.arange(3, dtype=np.float16))), np.float16),
        (arrow(a=pa.array([1, 2, 4], pa.float32()), b=[1, 2, 4]), np.float64),
        (pl.DataFrame({"a": [1, None, 4]}, schema={"a": pl.Float32}), np.float32),
        (pl.DataFrame({"a": [1, 2, 4], "b": [1, 2, 4]}, schema={"a": pl.Float32, "b": pl.Int16}), np.float64),
        (pd.DataFrame({"a": pd.array([1, None, 4], dtype="Float32")}), np.float32),
        (pd.DataFrame({"a": pd.array([1, None, 4], dtype="float[pyarrow]")}), np.float32),
        (pd.DataFrame({"a": np.arange(3, dtype=np.float16)}), np.float16),
        (pd.DataFrame({"a": [True, False, True], "b": np.arange(3, dtype=np.float32)}), np.float32),
        (pd.DataFrame({"a": pd.array([True, None, False], dtype="boolean")}), np.float64),
        (pl.DataFrame({"a": [True, None, False], "b": [1, 2, 3]}), np.float64),
        (arrow(a=[True, None, False]), np.float64),
    ],
)
def test_dtypes_of_floats_are_kept(frame: Any, dtype: Any) -> None:
    y = StandardScaler().fit_transform(frame)
    assert np.asarray(y["a"]).dtype == dtype


def test_the_columns_of_a_result_are_named_as_they_are() -> None:
    table = arrow(a=[1.0, 2, 4], b=[1.0, 5, 3])
    assert Whitener("pca").fit_transform(table).schema.names == ["whitener0", "whitener1"]
    scaler = StandardScaler().fit(table)
    assert scaler.set_output(transform="pandas").transform(table).columns.to_list() == ["a", "b"]
    with pytest.raises(InputError, match="feature names should match"):
        scaler.transform(table.rename_columns(["a", "c"]))
    with pytest.raises(InputError, match="feature names should match"):
        scaler.transform(pa.record_batch({"b": [1.0], "a": [2.0]}))
    with pytest.raises(InputError, match=r"infinity: row 1, column 1 \('b'\)"):
        scaler.transform(arrow(a=[1.0, 2], b=[1.0, np.inf]))


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (pd.DataFrame({"x": [1.0, 2], "city": ["a", "b"]}), "expected numbers, got str.* in column 'city': encode or"),
        (pd.DataFrame({"x": [1.0, 2], "city": pd.Categorical([1, 2])}), "got category in column 'city'"),
        (pd.DataFrame({"when": pd.date_range("2020", periods=2)}), "got datetime64.* in column 'when'"),
        (pd.DataFrame({"when": pd.date_range("2020", periods=2, tz="UTC")}), "got datetime64.* in column 'when'"),
        (pd.DataFrame({"took": pd.to_timedelta([1, 2])}), "got timedelta64.* in column 'took'"),
        (pd.DataFrame({"o": np.array([1, "2"], dtype=object)}), r"got objects \(mixed-integer\) in column 'o'"),
        (pd.DataFrame({"o": np.array([DAY, DAY], dtype=object)}), r"got objects \(date\) in column 'o'"),
        (pd.DataFrame({"s": pd.array(["1", None], dtype="string[pyarrow]")}), "got string in column 's'"),
        (pd.DataFrame({"z": [1j, 2]}), "got complex128 in column 'z'"),
        (pd.DataFrame({"s": pd.arrays.SparseArray([0.0, 1])}), r"column 's' is sparse: pass X.sparse.to_coo\(\)"),
        (pl.DataFrame({"x": [1.0, 2], "city": ["a", "b"]}), "got String in column 'city'"),
        (pl.DataFrame({"c": ["a", "b"]}, schema={"c": pl.Categorical}), "got Categorical in column 'c'"),
        (pl.DataFrame({"when": [DAY, DAY]}), "got Date in column 'when'"),
        (pl.DataFrame({"l": [[1.0], [2.0]]}), "got List.* in column 'l'"),
        (arrow(x=[1.0, 2], city=["a", "b"]), "got string in column 'city'"),
        (arrow(x=[1.0, 2], when=[DAY, DAY]), "got date32.* in column 'when'"),
        (arrow(c=pa.array(["a", "b"]).dictionary_encode()), "got dictionary.* in column 'c'"),
        (pl.LazyFrame({"a": [1.0]}), r"got a LazyFrame, which is a plan: pass X.collect\(\)"),
    ],
)
def test_what_is_no_number_is_refused_by_its_name(frame: Any, text: str) -> None:
    for estimator in (StandardScaler(), Whitener("zca")):
        with pytest.raises(InputError, match=text) as caught:
            estimator.fit(frame)
        assert "\n" not in str(caught.value)
        assert not hasattr(estimator, "n_features_in_")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pd.Series([1.0, 2]), r"Series holds a single feature, pass X.to_frame\(\)"),
        (pd.Index([1.0, 2]), r"Index holds a single feature, pass X.to_frame\(\)"),
        (pl.Series([1.0, 2]), r"Series holds a single feature, pass X.to_frame\(\)"),
        (pa.array([1.0, 2]), "an Arrow array holds a single feature, pass pa.table"),
        (pa.chunked_array([[1.0, 2]]), "an Arrow array holds a single feature, pass pa.table"),
    ],
)
def test_a_single_column_is_no_frame(column: Any, text: str) -> None:
    with pytest.raises(ShapeError, match=f"Expected 2D array, got 1D array instead: {text}"):
        StandardScaler().fit(column)


def test_frames_without_rows_or_columns() -> None:
    for frame in (pd.DataFrame({"a": []}, dtype=float), pl.DataFrame({"a": []}, schema={"a": pl.Float64})):
        with pytest.raises(ShapeError, match=r"Found array with 0 sample\(s\)"):
            StandardScaler().fit(frame)
    with pytest.raises(ShapeError, match=r"Found array with 0 sample\(s\)"):
        StandardScaler().fit(arrow(a=pa.array([], pa.float64())))
    for nothing in (pd.DataFrame(index=[0, 1]), pa.table({})):
        with pytest.raises(ShapeError, match=r"Found array with 0 (feature|sample)\(s\)"):
            StandardScaler().fit(nothing)


def test_names_of_two_kinds_are_refused() -> None:
    with pytest.raises(DtypeError, match="Feature names are only supported if all input features have string names"):
        StandardScaler().fit(pd.DataFrame(VALUES, columns=["a", 1]))


def test_weights_may_be_columns() -> None:
    expected = StandardScaler().fit(VALUES, sample_weight=[1, 2, 3]).mean_
    for weights in (pd.Series([1, 2, 3]), pl.Series([1, 2, 3]), pa.array([1, 2, 3])):
        np.testing.assert_array_equal(StandardScaler().fit(VALUES, sample_weight=weights).mean_, expected)
