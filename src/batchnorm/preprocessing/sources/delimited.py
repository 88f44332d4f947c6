"""Text with a column a feature: .csv and .tsv, compressed or not, through pyarrow."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchnorm._errors import InputError, ShapeError
from batchnorm.preprocessing.sources.arrow import TabularSource
from batchnorm.preprocessing.sources.columns import choose
from batchnorm.preprocessing.sources.files import need
from batchnorm.preprocessing.sources.paths import COMPRESSED, partitions
from batchnorm.preprocessing.sources.source import Part

# Of text; pyarrow parses one block while the one before is converted.
_BLOCK_BYTES = 4 * 2**20


class CsvSource(TabularSource):
    """``.csv``: the first line names the columns, numbers are float64, an empty field is NaN.

    Read a block of lines at a time. What pyarrow reads as null is missing: ``NA``, ``nan``, ``null`` and the like.
    """

    kind = "CSV"

    def read(self, file: str) -> Iterator[Part]:
        """Blocks of lines, as matrices."""
        pa = need("pyarrow")
        schema = self.schema(file)
        features = self.features(file, schema)
        row, before = 0, self.read_bytes
        # A type that the first lines suggest, integers say, is none to hold the later ones to.
        booleans = {name for name in features.needed if pa.types.is_boolean(schema.field(name).type)}
        types = {name: pa.float64() for name in features.needed if name not in booleans}
        try:
            with _opened(file) as (raw, stream):
                for batch in _reader(stream, file, types, features.needed):
                    for values, weights in features.arrays(batch, row):
                        self.read_bytes = before + raw.tell()
                        yield Part(values, weights, file, row)
                        row += len(values)
                        del values
        except pa.ArrowInvalid as error:
            refuse_line(file, features.needed, booleans)
            raise ValueError(str(error).replace("CSV parse error: ", "")) from error

    def schema(self, file: str) -> Any:
        """The names are in the first line, the types what the first block of lines looks like."""
        pa = need("pyarrow")
        with _opened(file) as (_, stream):
            text = _text(stream)
            header = next(csv.reader(text, delimiter=_delimiter(file)), [])
            text.detach()
        _check_header(file, header, self.choice.columns)
        choose(header, self.choice, file, list(partitions(file)))
        asked = None if self.choice.columns is None else {*self.choice.columns, self.choice.weights}
        wanted = [name for name in header if asked is None or name in asked]
        try:
            with _opened(file) as (_, stream), _reader(stream, file, {}, wanted) as reader:
                schema = reader.schema
        except pa.ArrowInvalid as error:
            refuse_line(file, wanted, set())
            raise ValueError(str(error).replace("CSV parse error: ", "")) from error
        fields = []
        for name in header:
            type_ = schema.field(name).type if name in wanted else pa.null()
            if pa.types.is_string(type_) or pa.types.is_binary(type_):
                refuse_line(file, [name], set())
            number = pa.types.is_integer(type_) or pa.types.is_null(type_)
            fields.append((name, pa.float64() if number else type_))
        return pa.schema(fields)


def _delimiter(file: str) -> str:
    name = os.path.basename(file).lower()
    return "\t" if ".tsv" in name[-8:] else ","


@contextmanager
def _opened(file: str) -> Iterator[tuple[Any, Any]]:
    """The file, whose place says how much of it is read, and the text in it."""
    pa = need("pyarrow")
    codec = COMPRESSED.get(os.path.splitext(file.lower())[1])
    with pa.OSFile(file) as raw:
        if codec is None:
            yield raw, raw
        else:
            with pa.CompressedInputStream(raw, codec) as stream:
                yield raw, stream


def _reader(stream: Any, file: str, types: dict[str, Any], wanted: list[str]) -> Any:
    pacsv = need("pyarrow.csv")
    return pacsv.open_csv(
        stream,
        pacsv.ReadOptions(block_size=_BLOCK_BYTES),
        pacsv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True),
        pacsv.ConvertOptions(column_types=types, include_columns=wanted, check_utf8=False),
    )


def _text(stream: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def _check_header(file: str, header: list[str], columns: tuple[str, ...] | None) -> None:
    if not header:
        raise InputError(f"{file}: the first line is empty, expected the names of the columns")
    # 0,1,2,... are names that pandas gives.
    if all(_is_number(name) for name in header) and header != [str(i) for i in range(len(header))]:
        raise InputError(
            f"{file}: the first line holds numbers ({','.join(header[:4])}...), expected the names of the columns"
        )
    for name in header if columns is None else columns:
        if header.count(name) > 1:
            raise InputError(f"{file}: has {header.count(name)} columns named {name!r}: rename them")
    if columns is None and "" in header:
        raise InputError(
            f"{file}: column {header.index('')} has no name (an index?): choose the features with columns="
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def refuse_line(file: str, wanted: list[str], booleans: set[str]) -> None:
    """Raise an error that names the first line that is too short, too long or holds text, if there is one.

    pyarrow, reading in parallel, does not know the number of the line, so the file is read once more.
    """
    missing = set(need("pyarrow.csv").ConvertOptions().null_values)
    with _opened(file) as (_, stream):
        text = _text(stream)
        lines = csv.reader(text, delimiter=_delimiter(file))
        header = next(lines, [])
        watched = [(header.index(name), name) for name in wanted if name in header]
        row = 0
        for line in lines:
            if not line:
                continue
            where = f"{file}: row {row} (line {lines.line_num})"
            if len(line) != len(header):
                raise ShapeError(f"{where}: {len(line)} fields, expected {len(header)} as the first line has")
            for index, name in watched:
                value = line[index]
                if value in missing or (name in booleans and value.lower() in ("true", "false")) or _is_number(value):
                    continue
                raise InputError(
                    f"{where}, column {name!r}: expected a number, got {value[:40]!r}; "
                    "mend it, or choose other columns with columns="
                )
            row += 1
        text.detach()
