"""Parquet and Arrow (Feather) files, through pyarrow."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from batchnorm.preprocessing.sources.files import FileSource, need, reading
from batchnorm.preprocessing.sources.paths import partitions
from batchnorm.preprocessing.sources.source import Part
from batchnorm.preprocessing.sources.tables import Features


class TabularSource(FileSource):
    """Files of columns with names, which later files must have too, in whatever order."""

    @cached_property
    def names(self) -> list[str] | None:  # type: ignore[override]
        """The chosen columns, as the first file has them."""
        return self._first.names

    @cached_property
    def _first(self) -> Features:
        file = self.files[0]
        with reading(file, self.kind):
            return Features(self.schema(file), self.choice, file, partitions(file))

    def features(self, file: str, schema: Any) -> Features:
        """The chosen columns of a file. Raises InputError where they are not those of the first."""
        if file == self.files[0]:
            return self._first
        return Features(schema, self.choice, file, partitions(file), (self.files[0], self._first.chosen))

    def schema(self, file: str) -> Any:
        """Names and types of the columns of a file."""
        raise NotImplementedError


class ParquetSource(TabularSource):
    """``.parquet``: the chosen columns alone are read and decoded, several of them at a time."""

    kind = "Parquet"

    def read(self, file: str) -> Iterator[Part]:
        """Record batches, as matrices."""
        with self._open(file) as parquet:
            features = self.features(file, parquet.schema_arrow)
            row = 0
            for batch in parquet.iter_batches(features.batch_rows, columns=features.needed):
                for values, weights in features.arrays(batch, row):
                    yield Part(values, weights, file, row)
                    row += len(values)
                    del values
                del batch

    def schema(self, file: str) -> Any:
        """From the file's end."""
        with self._open(file) as parquet:
            return parquet.schema_arrow

    def count(self, file: str) -> int | None:
        """From the file's end."""
        with self._open(file) as parquet:
            return int(parquet.metadata.num_rows)

    @staticmethod
    def _open(file: str) -> Any:
        # Without a buffer size pyarrow reads the whole of a column's row group before it decodes a part of it.
        return need("pyarrow.parquet").ParquetFile(
            file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
        )


class ArrowSource(TabularSource):
    """``.arrow``, ``.feather``: Arrow's own format, as a file or as a stream."""

    kind = "Arrow"

    def read(self, file: str) -> Iterator[Part]:
        """Record batches, as matrices."""
        with _mapped(file) as (memory, reader):
            features = self.features(file, reader.schema)
            row = 0
            for batch in _batches(reader):
                for values, weights in features.arrays(batch, row):
                    if hasattr(memory, "madvise"):
                        memory.madvise(mmap.MADV_DONTNEED)
                    # A list's numbers may still lie in the map, which is closed before the caller is done with them.
                    yield Part(values.copy() if features.lists else values, weights, file, row)
                    row += len(values)
                    del values

    def schema(self, file: str) -> Any:
        """From the file's beginning."""
        with _mapped(file) as (_, reader):
            return reader.schema

    def count(self, file: str) -> int | None:
        """From the heads of the record batches; a stream would have to be read."""
        with _mapped(file) as (_, reader):
            if not hasattr(reader, "num_record_batches"):
                return None
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))


@contextmanager
def _mapped(file: str) -> Iterator[tuple[mmap.mmap, Any]]:
    """The file as memory, and a reader of it. The memory goes when the last array in it does."""
    pa = need("pyarrow")
    with open(file, "rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    source = pa.BufferReader(pa.py_buffer(memory))
    framed = memory[:6] == b"ARROW1"
    if memory[:4] == b"FEA1":
        raise ValueError("version 1 of Feather is not read: write it again with Arrow")
    yield memory, (pa.ipc.open_file(source) if framed else pa.ipc.open_stream(source))


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from reader
