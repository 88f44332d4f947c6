"""Columns of Arrow data as one matrix: which of them are numbers, in which common type, nulls as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError, ShapeError
from batchnorm.preprocessing.sources.columns import Choice, choose, listed
from batchnorm.preprocessing.sources.files import need
from batchnorm.preprocessing.sources.source import rows_of


def number_type(type_: Any) -> np.dtype[Any] | None:
    """The NumPy type of an Arrow type of numbers, None for text, times and all else."""
    pa = need("pyarrow")
    types = pa.types
    if types.is_boolean(type_):
        return np.dtype(np.uint8)
    if types.is_integer(type_) or types.is_floating(type_):
        return np.dtype(type_.to_pandas_dtype())
    return np.dtype(np.float64) if types.is_decimal(type_) or types.is_null(type_) else None


def list_item(type_: Any) -> Any:
    """The type of the items of a column of lists or of tensors, None for other columns."""
    types = need("pyarrow").types
    storage = getattr(type_, "storage_type", type_)
    if types.is_list(storage) or types.is_large_list(storage) or types.is_fixed_size_list(storage):
        return storage.value_type
    return None


class Features:
    """The chosen columns of one schema: checked once, then taken out of every record batch.

    ``names``: of the features; None for a column of lists, which is (n, features) by itself. ``needed``: the columns
    to read. ``dtype``: NumPy's common type of the columns, in which all their values are exact, float64 if all are
    integers. ``constants``: columns that are not in the data, see ``paths.partitions``.
    """

    def __init__(
        self,
        schema: Any,
        choice: Choice,
        where: str,
        constants: dict[str, str | None] | None = None,
        like: tuple[str, list[str]] | None = None,
    ) -> None:
        self.where = where
        self.file = None if where.startswith("the ") else where
        there = list(schema.names)
        more = [name for name in constants or {} if name not in there]
        self.chosen: list[str] = choose(there, choice, where, more)
        self.weights = choice.weights
        for name in (*self.chosen, *([] if self.weights is None else [self.weights])):
            if there.count(name) > 1:
                raise InputError(f"{where}: has {there.count(name)} columns named {name!r}: rename them")
        if like is not None and choice.columns is None:
            self.chosen = _same_columns(where, self.chosen, *like)
        wanted = [*self.chosen, *([] if self.weights is None else [self.weights])]
        self.needed = [name for name in wanted if name in there]
        self.constants = {name: _number(where, name, (constants or {})[name]) for name in wanted if name in more}
        self.lists = False
        dtypes = [np.dtype(np.float64) if name in more else self._checked(schema, name) for name in self.chosen]
        common = np.result_type(*dtypes)
        self.dtype = common if common.kind == "f" else np.dtype(np.float64)
        self.names = None if self.lists else self.chosen
        columns = len(self.chosen)
        if self.lists:
            type_ = schema.field(self.chosen[0]).type
            columns = getattr(getattr(type_, "storage_type", type_), "list_size", 1024)
        self.batch_rows = rows_of((0, columns), self.dtype.itemsize, choice.batch_rows)

    def _checked(self, schema: Any, name: str) -> np.dtype[Any]:
        type_ = schema.field(name).type
        item = list_item(type_)
        dtype = number_type(type_ if item is None else item)
        if dtype is None:
            what = "text" if str(type_).endswith("string") or "values=string" in str(type_) else str(type_)
            numbers = [f.name for f in schema if number_type(f.type) is not None and f.name != self.weights]
            raise InputError(
                f"{self.where}: column {name!r} holds {what}, expected numbers: "
                + (f"choose with columns=, numbers are in {listed(numbers)}" if numbers else "no column holds numbers")
            )
        if item is not None:
            if len(self.chosen) > 1:
                raise InputError(
                    f"{self.where}: column {name!r} holds lists, which are a batch by themselves: choose either it "
                    f"alone with columns={name!r} or the others"
                )
            self.lists = True
        return dtype

    def arrays(self, batch: Any, row: int) -> Iterator[tuple[NDArray[Any], NDArray[np.float64] | None]]:
        """A record batch as matrices of at most ``batch_rows`` rows, and their weights; ``row`` is its first one's."""
        for start in range(0, batch.num_rows, self.batch_rows):
            piece = batch.slice(start, self.batch_rows)
            weights = None
            if self.weights is not None:
                weights = np.empty(piece.num_rows)
                self._fill(weights, piece, self.weights)
            if self.lists:
                yield self._list_rows(piece.column(self.chosen[0]), row + start), weights
                continue
            # Column-major: a column is copied as it lies, a row-major matrix would take fifteen times as long.
            values = np.empty((len(self.chosen), piece.num_rows), self.dtype)
            for name, column in zip(self.chosen, values, strict=True):
                self._fill(column, piece, name)
            yield values.T, weights

    def _fill(self, out: NDArray[Any], batch: Any, name: str) -> None:
        out[:] = self.constants[name] if name in self.constants else _numbers(batch.column(name))

    def _list_rows(self, column: Any, row: int) -> NDArray[Any]:
        column = getattr(column, "storage", column)
        lengths = need("pyarrow.compute").list_value_length(column)
        missing = np.asarray(column.is_null().to_numpy(zero_copy_only=False), dtype=bool)
        counts = lengths.fill_null(0).to_numpy(zero_copy_only=False)
        present = np.flatnonzero(~missing)
        width = int(counts[present[0]]) if len(present) else 0
        ragged = present[counts[present] != width]
        where = "" if self.file is None else f"{self.file}: "
        if len(ragged):
            raise ShapeError(
                f"{where}row {row + ragged[0]}, column {self.chosen[0]!r}: a list of {counts[ragged[0]]} numbers, "
                f"expected {width} as in the rows before"
            )
        values = _numbers(column.flatten()).astype(self.dtype, copy=False).reshape(len(present), width)
        if len(present) == len(column):
            return values
        out = np.full((len(column), width), np.nan, self.dtype)
        out[present] = values
        return out


def _numbers(column: Any) -> NDArray[Any]:
    """An Arrow column as an array, null as NaN; without a copy where there is none."""
    import pyarrow as pa  # a column is here, so this is; need() takes a lookup for each of many

    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    elif pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _number(where: str, name: str, text: str | None) -> float:
    if text is None:
        return float("nan")
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{where}: partition column {name!r} is {text!r}, expected a number") from error


def _same_columns(where: str, found: list[str], first: str, expected: list[str]) -> list[str]:
    """The columns of another file, matched by name, in the order of the first file's."""
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r}, which {first} has")
    more = [name for name in found if name not in expected]
    if more:
        raise InputError(f"{where}: column {more[0]!r} is not in {first}: choose those of both with columns=")
    return expected
