"""Data frames as arrays, and back: pandas, polars, pyarrow. A column that holds no numbers is refused by its name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError, ShapeError

Array = NDArray[Any]


def _is(X: Any, library: str, *names: str) -> bool:
    """Whether ``X`` is of one of these classes of a library; nothing is of a library that was never imported."""
    module = sys.modules.get(library)
    return any(isinstance(X, getattr(module, name, ())) for name in names)


def refuse_other_containers(X: Any) -> None:
    """Raise for what looks like a frame and is none: a single column, or a plan of one."""
    if _is(X, "pandas", "Series", "Index") or _is(X, "polars", "Series"):
        raise ShapeError(
            f"Expected 2D array, got 1D array instead: {type(X).__name__} holds a single feature, pass X.to_frame()"
        )
    if _is(X, "pyarrow", "Array", "ChunkedArray"):
        raise ShapeError(
            "Expected 2D array, got 1D array instead: an Arrow array holds a single feature, pass pa.table({'x': X})"
        )
    if _is(X, "polars", "LazyFrame"):
        raise InputError("expected data, got a LazyFrame, which is a plan: pass X.collect(), or the path of its file")


def is_frame(X: Any) -> bool:
    """Whether ``X`` is a frame of one of the three libraries."""
    return _is(X, "pandas", "DataFrame") or _is(X, "polars", "DataFrame") or _is(X, "pyarrow", "Table", "RecordBatch")


def named(X: Any) -> Any:
    """The frame as one that scikit-learn can read the names from: not a RecordBatch, but its Table."""
    if _is(X, "pyarrow", "RecordBatch"):
        import pyarrow as pa

        return pa.Table.from_batches([X])
    return X


def column_names(X: Any) -> list[Any] | None:
    """The names of a frame's columns, None for what is no frame."""
    if not is_frame(X):
        return None
    return list(X.schema.names if _is(X, "pyarrow", "Table", "RecordBatch") else X.columns)


def read_frame(X: Any) -> Array:
    """A frame's values as an array (rows, columns) of floats or integers, of the dtype that holds all columns.

    A missing value (None, NA, null) is NaN. Raises InputError for a column that holds no numbers.
    """
    if _is(X, "pandas", "DataFrame"):
        return _from_pandas(X)
    return _from_polars(X) if _is(X, "polars", "DataFrame") else _from_arrow(X)


def like_frame(source: Any, array: Array, names: Sequence[Any] | None) -> Any:
    """``array`` as a frame like ``source``, with its names or others; None where ``source`` is no frame."""
    if _is(source, "pandas", "DataFrame"):
        columns = source.columns if names is None else names
        return type(source)(array, index=source.index, columns=columns, copy=False)
    if _is(source, "polars", "DataFrame"):
        return type(source)(array, schema=list(source.columns if names is None else names), orient="row")
    if _is(source, "pyarrow", "Table", "RecordBatch"):
        import pyarrow as pa

        columns = [pa.array(np.ascontiguousarray(column)) for column in array.T]
        return type(source).from_arrays(columns, names=list(source.schema.names if names is None else names))
    return None


def _refuse(name: Any, kind: Any) -> NoReturn:
    raise InputError(f"expected numbers, got {kind} in column {str(name)!r}: encode or drop the column")


def _common(dtypes: Iterable[Any]) -> np.dtype[Any]:
    return np.result_type(*dtypes)


def _from_pandas(X: Any) -> Array:
    import pandas as pd

    kinds = set(X.dtypes)
    if all(isinstance(kind, np.dtype) and kind.kind in "fiub" for kind in kinds):
        # Without a dtype booleans beside numbers would give objects.
        return X.to_numpy(dtype=_common(kinds) if len(kinds) > 1 else None)
    columns, dtypes = [], []
    for place, name in enumerate(X.columns):
        column = X.iloc[:, place]
        kind = column.dtype
        if isinstance(kind, pd.SparseDtype):
            raise InputError(f"column {str(name)!r} is sparse: pass X.sparse.to_coo().tocsr() or X.sparse.to_dense()")
        if isinstance(kind, np.dtype) and kind.kind == "O":
            found = pd.api.types.infer_dtype(column, skipna=True)
            if found not in ("floating", "integer", "mixed-integer-float", "decimal", "boolean", "empty"):
                _refuse(name, f"objects ({found})")
            column = column.where(column.notna(), np.nan).astype(np.float64)
        elif not (pd.api.types.is_numeric_dtype(kind) or pd.api.types.is_bool_dtype(kind)) or _is_complex(kind):
            _refuse(name, kind)
        own = getattr(column.dtype, "numpy_dtype", column.dtype)
        if own.kind not in "fiub" or (own.kind != "f" and column.isna().any()):
            own = np.dtype(np.float64)
        columns.append(column.to_numpy(dtype=own, **({"na_value": np.nan} if own.kind == "f" else {})))
        dtypes.append(own)
    return np.column_stack([column.astype(_common(dtypes), copy=False) for column in columns])


def _is_complex(kind: Any) -> bool:
    return getattr(kind, "kind", "f") == "c"


def _from_polars(X: Any) -> Array:
    import polars as pl

    for name, kind in X.schema.items():
        if not (kind.is_numeric() or kind in (pl.Boolean, pl.Null)):
            _refuse(name, kind)
    # Integers with nulls, booleans and decimals have no common type that NumPy knows.
    others = [name for name, kind in X.schema.items() if not kind.is_float()]
    if others and not all(kind.is_integer() for kind in X.schema.values()):
        X = X.with_columns(pl.col(others).cast(pl.Float64))
    array: Array = X.to_numpy()
    return array


def _from_arrow(X: Any) -> Array:
    import pyarrow as pa

    columns: list[Array] = []
    for name, column in zip(X.schema.names, X.columns, strict=True):
        kind = column.type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            if not (pa.types.is_boolean(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)):
                _refuse(name, kind)
            column = column.cast(pa.float64())
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        parts = [chunk.to_numpy(zero_copy_only=False) for chunk in chunks]
        columns.append(np.concatenate(parts) if parts else np.empty(0))
    if not columns:
        return np.empty((X.num_rows, 0))
    # Column by column, as Arrow has them and as the result goes back.
    out = np.empty((X.num_rows, len(columns)), dtype=_common(column.dtype for column in columns), order="F")
    for place, column in enumerate(columns):
        out[:, place] = column
    return out
