"""Sources in memory: arrays, tensors, frames and Arrow tables, in blocks of rows that share their memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources.columns import Choice, choose, weights_of
from batchnorm.preprocessing.sources.source import Part, Source, rows_of


class ArraySource(Source):
    """Blocks of rows of an array or a tensor, without a copy."""

    def __init__(self, array: Any, batch_rows: int | None = None) -> None:
        self.array = array
        self.label = f"the {type(array).__name__}"
        shape = tuple(array.shape)
        self.rows = shape[0] if shape else 0
        self.batch_rows = rows_of(shape, array.dtype.itemsize, batch_rows)

    def parts(self) -> Iterator[Part]:
        """Slices."""
        for start in range(0, self.rows or 0, self.batch_rows):
            yield Part(self.array[start : start + self.batch_rows], row=start)


class MemoryMapSource(Source):
    """Blocks of rows of a memory-mapped array; pages that were read are given back to the system."""

    ahead = 1

    def __init__(self, array: NDArray[Any], batch_rows: int | None = None) -> None:
        self.array = array
        self.rows = array.shape[0] if array.ndim else 0
        self.label = str(getattr(array, "filename", None) or "the memory map")
        self.batch_rows = rows_of(array.shape, array.itemsize, batch_rows)

    def parts(self) -> Iterator[Part]:
        """Blocks, copied out of the map."""
        for start in range(0, self.rows or 0, self.batch_rows):
            # As a plain array: a slice that is still a memory map would be copied as one.
            block = np.array(np.asarray(self.array[start : start + self.batch_rows]))
            release(self.array)
            yield Part(block, file=self.label, row=start)


def release(array: NDArray[Any]) -> None:
    """Let go of the pages of a memory map: those that were read count as the process's own until it says so."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


class FrameSource(Source):
    """Blocks of rows of a pandas or polars frame, each a frame."""

    def __init__(self, frame: Any, choice: Choice) -> None:
        self.label = f"the {type(frame).__name__}"
        columns = list(frame.columns)
        chosen = choose(columns, choice, where=self.label)
        self.rows = int(frame.shape[0])
        self.frame = frame
        self.chosen: Sequence[Any] = chosen
        self.weights = choice.weights
        self.names = chosen if all(isinstance(name, str) for name in chosen) else None
        self.batch_rows = rows_of((self.rows, len(chosen)), 8, choice.batch_rows)

    def parts(self) -> Iterator[Part]:
        """Slices; the columns are views where the frame keeps them so."""
        for start in range(0, self.rows or 0, self.batch_rows):
            stop = start + self.batch_rows
            block = self.frame.iloc[start:stop] if hasattr(self.frame, "iloc") else self.frame[start:stop]
            weights = None
            if self.weights is not None:
                weights = weights_of(block[self.weights].to_numpy(), self.weights, self.label)
            yield Part(block[self.chosen], weights, row=start)


class TableSource(Source):
    """Blocks of rows of an Arrow table, dataset or stream of record batches, each as an array."""

    def __init__(self, table: Any, choice: Choice) -> None:
        from batchnorm.preprocessing.sources.tables import Features

        self.table = table
        self.label = f"the {type(table).__name__}"
        self.again = not hasattr(table, "read_next_batch")
        self.rows = getattr(table, "num_rows", None)
        self.ahead = 0 if self.rows is not None else 1
        self.features = Features(table.schema, choice, self.label)
        self.names = self.features.names

    def parts(self) -> Iterator[Part]:
        """Slices of the record batches."""
        row = 0
        for batch in self._batches():
            for values, weights in self.features.arrays(batch, row):
                yield Part(values, weights, row=row)
                row += len(values)

    def _batches(self) -> Iterator[Any]:
        if hasattr(self.table, "to_batches"):
            yield from self.table.to_batches()
        elif hasattr(self.table, "read_next_batch"):
            yield from self.table
        else:
            yield self.table


def refuse_columns(label: str, choice: Choice) -> None:
    """Raise where columns are asked for of data that has no names for them."""
    if choice.columns is not None or choice.weights is not None:
        raise InputError(f"{label} has no names of columns to choose from: drop columns= and weights=")
