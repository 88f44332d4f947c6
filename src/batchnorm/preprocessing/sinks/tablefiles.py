"""Readers of Parquet, Arrow and CSV files with all their columns, through pyarrow."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchnorm._errors import InputError
from batchnorm.preprocessing.sinks.reading import TableReader
from batchnorm.preprocessing.sources.columns import Choice
from batchnorm.preprocessing.sources.delimited import CsvSource, refuse_line
from batchnorm.preprocessing.sources.files import need

# Of text.
_BLOCK_BYTES = 4 * 2**20


class ParquetReader(TableReader):
    """Row group by row group: a block never spans two, so that it is the same wherever reading began."""

    kind = "Parquet"

    def look(self) -> list[str]:
        with self._open() as file:
            self._schema, self.rows = file.schema_arrow, file.metadata.num_rows
            if self.rows:
                name = file.metadata.row_group(0).column(0).compression.lower()
                self.compression = "none" if name == "uncompressed" else name
        return list(self._schema.names)

    def typed(self, chosen: list[str]) -> Any:  # noqa: ARG002 -- the file knows its types
        return self._schema

    def tables(self, start: int) -> Iterator[tuple[int, Any]]:
        pa = need("pyarrow")
        with self._open() as file:
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows > start:
                    at = row
                    for batch in file.iter_batches(self.batch_rows, row_groups=[group]):
                        yield at, pa.Table.from_batches([batch])
                        at += len(batch)
                row += rows

    def _open(self) -> Any:
        # Without a buffer size pyarrow reads the whole of a column's row group before it decodes a part of it.
        return need("pyarrow.parquet").ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)


class ArrowReader(TableReader):
    """An Arrow IPC file (Feather is one), or a stream of Arrow in a file."""

    kind = "Arrow"

    def look(self) -> list[str]:
        pa = need("pyarrow")
        with pa.OSFile(str(self.path)) as file:
            reader = _ipc(file)
            self._schema, self.rows = reader.schema, None
            if hasattr(reader, "num_record_batches"):
                self.rows = sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
        return list(self._schema.names)

    def typed(self, chosen: list[str]) -> Any:  # noqa: ARG002 -- the file knows its types
        return self._schema

    def tables(self, start: int) -> Iterator[tuple[int, Any]]:
        pa = need("pyarrow")
        with pa.OSFile(str(self.path)) as file:
            reader = _ipc(file)
            framed = hasattr(reader, "num_record_batches")
            row = 0
            for batch in map(reader.get_batch, range(reader.num_record_batches)) if framed else reader:
                if row + len(batch) > start:
                    yield row, pa.Table.from_batches([batch])
                row += len(batch)


class CsvReader(TableReader):
    """Lines of text. What is no feature is taken as the text that it is, and comes out as that."""

    kind = "CSV"
    rows = None

    def look(self) -> list[str]:
        pa = need("pyarrow")
        # pyarrow knows by the name which files are compressed.
        with pa.input_stream(str(self.path)) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            names = next(csv.reader(text, delimiter=delimiter_of(self.path)), None)
        if not names:
            raise InputError(f"{self.path}: the first line is empty, expected the names of the columns")
        self._names = names
        return names

    def typed(self, chosen: list[str]) -> Any:
        pa = need("pyarrow")
        types = dict.fromkeys(self._names, pa.string())
        wanted = [name for name in chosen if name in types]
        if wanted:
            found = CsvSource(str(self.path), [str(self.path)], Choice(tuple(wanted))).schema(str(self.path))
            types |= {name: found.field(name).type for name in wanted}
        return pa.schema([(name, types[name]) for name in self._names])

    def tables(self, start: int) -> Iterator[tuple[int, Any]]:  # noqa: ARG002 -- lines have to be read to be counted
        pa, arrow_csv = need("pyarrow"), need("pyarrow.csv")
        row = 0
        try:
            with arrow_csv.open_csv(
                str(self.path),
                arrow_csv.ReadOptions(block_size=_BLOCK_BYTES),
                arrow_csv.ParseOptions(delimiter=delimiter_of(self.path), newlines_in_values=True),
                arrow_csv.ConvertOptions(
                    column_types=self.schema, include_columns=self.schema.names, strings_can_be_null=False
                ),
            ) as reader:
                for batch in reader:
                    yield row, pa.Table.from_batches([batch])
                    row += len(batch)
        except pa.ArrowInvalid as error:
            booleans = {field.name for field in self.schema if pa.types.is_boolean(field.type)}
            refuse_line(str(self.path), list(self.features.chosen), booleans)
            raise ValueError(str(error).replace("CSV parse error: ", "")) from error


READERS: dict[str, type[TableReader]] = {"parquet": ParquetReader, "arrow": ArrowReader, "csv": CsvReader}


def delimiter_of(path: Path) -> str:
    """What parts the columns of a text."""
    return "\t" if ".tsv" in path.name.lower()[-8:] else ","


def _ipc(file: Any) -> Any:
    pa = need("pyarrow")
    framed = file.read(6) == b"ARROW1"
    file.seek(0)
    return pa.ipc.open_file(file) if framed else pa.ipc.open_stream(file)
