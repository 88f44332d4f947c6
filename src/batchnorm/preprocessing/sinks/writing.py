"""From transformed blocks to the file that a name asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm._errors import InputError, ShapeError
from batchnorm.preprocessing.sinks.arrays import NpySink, NpzSink, SafetensorsSink
from batchnorm.preprocessing.sinks.places import TABLES
from batchnorm.preprocessing.sinks.reading import ArrayReader, Block, Reader, TableReader
from batchnorm.preprocessing.sinks.sink import Sink
from batchnorm.preprocessing.sinks.tablefiles import delimiter_of
from batchnorm.preprocessing.sinks.tables import ArrowSink, CsvSink, ParquetSink
from batchnorm.preprocessing.sources.files import need
from batchnorm.preprocessing.sources.paths import kind_of


class Writer:
    """Writes the transformed blocks of ``reader`` to ``path``, as a file of its suffix.

    ``names``: of the transformed features. ``keep``: whether columns that are no features are carried along.
    """

    def __init__(self, reader: Reader, path: Path, scratch: Path, names: Sequence[str], keep: bool) -> None:
        self.reader = reader
        self.names = list(names)
        self.keep = keep
        self.kind = kind_of(str(path))
        if self.kind in TABLES:
            need("pyarrow")
        self.sink = _sink(reader, path, scratch)
        clash = set(self._carried()) & set(self.names)
        if clash:
            raise InputError(
                f"{reader.path} has a column {min(clash)!r} that is no feature, and a result has this name too: "
                "rename it, or leave such columns out"
            )

    def write(self, block: Block, values: Any) -> None:
        """Add the transformed ``values`` of ``block``."""
        if self.kind not in TABLES:
            self.sink.write(values)
            return
        pa = need("pyarrow")
        table = self._table(block, values)
        try:
            self.sink.write(table)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"cannot write the columns of {self.reader.path} as {self.kind}: {reason}") from error

    def _features(self) -> list[str]:
        """The columns of the data that the results take the place of."""
        return self.reader.features.chosen if isinstance(self.reader, TableReader) else []

    def _carried(self) -> list[str]:
        if not self.keep or self.kind not in TABLES or not isinstance(self.reader, TableReader):
            return []
        return [name for name in self.reader.schema.names if name not in self._features()]

    def _table(self, block: Block, values: Any) -> Any:
        pa = need("pyarrow")
        if values.ndim != 2:
            raise ShapeError(
                f"{self.reader.path}: holds samples of shape {tuple(values.shape[1:])}, but a {self.kind} file has "
                "rows of numbers: write .npy, .npz or .safetensors"
            )
        if self.kind == "csv" and values.dtype == np.float16:
            values = values.astype(np.float32)
        results = self._columns(values)
        if block.table is None:
            return pa.table(results)
        features, carried = self._features(), set(self._carried())
        arrays: dict[str, Any] = {}
        for name in block.table.column_names:
            if name in carried:
                arrays[name] = block.table.column(name)
            elif name in features and list(results) == features:
                arrays[name] = results[name]
            elif name in features and not arrays.keys() & results.keys():
                arrays.update(results)
        arrays.update({name: column for name, column in results.items() if name not in arrays})
        return pa.table(arrays).replace_schema_metadata(block.table.schema.metadata)

    def _columns(self, values: Any) -> dict[str, Any]:
        pa = need("pyarrow")
        name = getattr(self.reader, "lists", None)
        if name is not None and self.kind != "csv":
            return {name: pa.FixedSizeListArray.from_arrays(np.ascontiguousarray(values).reshape(-1), values.shape[1])}
        # In tables a missing value is null; but a line of CSV with nothing in it would be no row.
        lonely = self.kind == "csv" and len(self.names) + len(self._carried()) == 1
        columns = np.ascontiguousarray(values.T)
        return {n: pa.array(c, from_pandas=not lonely) for n, c in zip(self.names, columns, strict=True)}


def _sink(reader: Reader, path: Path, scratch: Path) -> Sink:
    kind = kind_of(str(path))
    if kind == "csv":
        return CsvSink(path, scratch, delimiter_of(path))
    if kind == "parquet":
        return ParquetSink(path, scratch, getattr(reader, "compression", "snappy"))
    if kind == "arrow":
        return ArrowSink(path, scratch, "lz4" if path.suffix.lower() == ".feather" else None)
    if kind == "npy":
        return NpySink(path, scratch)
    same = isinstance(reader, ArrayReader) and kind_of(str(reader.path)) == kind
    source, key = (reader.path, reader.key) if isinstance(reader, ArrayReader) and same else (None, None)
    if kind == "npz":
        return NpzSink(path, scratch, key or "arr_0", source)
    return SafetensorsSink(path, scratch, key or "data", source)
