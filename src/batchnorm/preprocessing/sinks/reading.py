"""Files read to be written again: the features as an array, and with them the columns that are none."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm._errors import InputError, ShapeError
from batchnorm.preprocessing.sources import open_source
from batchnorm.preprocessing.sources.columns import Choice, listed, near
from batchnorm.preprocessing.sources.files import need, reading
from batchnorm.preprocessing.sources.paths import kind_of, partitions
from batchnorm.preprocessing.sources.raw import NamedSource
from batchnorm.preprocessing.sources.source import Source, rows_of
from batchnorm.preprocessing.sources.tables import Features, list_item, number_type


@dataclass(frozen=True)
class Block:
    """Rows of a file: their features, the number of the first, and all their columns where there are such."""

    values: Any
    row: int
    table: Any = None


@dataclass(frozen=True)
class Learned:
    """Which features the statistics are of: how many, and their names where they have any."""

    width: int
    names: list[str] | None


class Reader:
    """A file that can be read from any row on.

    ``names``: of the features, None where they have none. ``rows``: how many, None where only reading would tell. The
    blocks are the same wherever reading began, if that was the first row of one.
    """

    path: Path
    names: list[str] | None
    rows: int | None

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """The file's rows from number ``start`` on."""
        raise NotImplementedError


class ArrayReader(Reader):
    """What has no columns: the array of an .npy, .npz or .safetensors file, a folder of images.

    ``key``: the name of the array in a file of several.
    """

    names = None

    def __init__(self, path: Path, source: Source) -> None:
        self.path = path
        self.source = source
        self.rows = source.rows
        self.key: str | None = None
        if isinstance(source, NamedSource):
            with reading(str(path), source.kind):
                self.key = source.pick(str(path), arrays_of(path))[0]

    def blocks(self, start: int = 0) -> Iterator[Block]:
        row = 0
        for part in self.source:
            end = row + len(part.values)
            if end > start:
                skipped = max(0, start - row)
                yield Block(part.values[skipped:], row + skipped)
            row = end


def arrays_of(path: Path) -> list[str]:
    """The names in an .npz or .safetensors file."""
    if kind_of(str(path)) == "npz":
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    with open(path, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sorted(head.keys() - {"__metadata__"})


class TableReader(Reader):
    """A file with columns. A subclass reads it; here its features are chosen and taken out.

    ``schema``: of all columns. ``lists``: the one column that holds a list of all features in each row, or None.
    """

    kind = "table"
    compression: str | None = None

    def __init__(self, path: Path) -> None:
        need("pyarrow")
        self.path = path

    def choose(self, learned: Learned, columns: Sequence[str] | None, batch_rows: int | None) -> None:
        """Open the file, and decide which columns are the features."""
        file = str(self.path)
        with reading(file, self.kind):
            names = self.look()
            chosen = self._choose(names, learned, columns)
            self.schema = self.typed(chosen)
            self.features = Features(self.schema, Choice(tuple(chosen)), file, partitions(file))
        self.names = self.features.names
        self.lists = chosen[0] if self.features.lists else None
        if self.names is not None and len(self.names) != learned.width:
            raise ShapeError(
                f"{file}: {len(chosen)} columns are asked for, the statistics are of {learned.width} features"
            )
        self.batch_rows = batch_rows or rows_of((0, max(learned.width, len(self.schema))), 8, None)

    def look(self) -> list[str]:
        """Open the file, and say which columns it has. Sets ``rows``."""
        raise NotImplementedError

    def typed(self, chosen: list[str]) -> Any:
        """The schema of what ``tables`` gives, where ``chosen`` are the features."""
        raise NotImplementedError

    def tables(self, start: int) -> Iterator[tuple[int, Any]]:
        """Tables, each with the number of its first row; what ends before ``start`` may be left out."""
        raise NotImplementedError

    def blocks(self, start: int = 0) -> Iterator[Block]:
        stream = self.tables(start)
        empty = True
        while True:
            with reading(str(self.path), self.kind):
                found = next(stream, None)
            if found is None:
                break
            row, table = found
            for at in range(0, len(table), self.batch_rows):
                piece = table.slice(at, self.batch_rows)
                skipped = min(max(0, start - row - at), len(piece))
                if skipped < len(piece):
                    empty = False
                    yield self._block(piece.slice(skipped), row + at + skipped)
        if empty and start == 0:
            yield Block(np.empty((0, len(self.features.chosen)), self.features.dtype), 0, self.schema.empty_table())

    def _block(self, table: Any, row: int) -> Block:
        (batch,) = table.combine_chunks().to_batches()
        pieces = [values for values, _ in self.features.arrays(batch, row)]
        return Block(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), row, table)

    def _choose(self, present: list[str], learned: Learned, columns: Sequence[str] | None) -> list[str]:
        known = [*present, *partitions(str(self.path))]
        if columns is not None and learned.names is not None and list(columns) != learned.names:
            pairs = zip([*learned.names, None], [*columns, None], strict=False)
            wanted, got = next((a, b) for a, b in pairs if a != b)
            raise InputError(f"the statistics are of other features: expected {wanted!r}, columns names {got!r}")
        chosen = learned.names if columns is None else list(columns)
        if chosen is None:
            return self._likely(learned)
        for name in chosen:
            if name not in known:
                raise InputError(f"{self.path}: no column {name!r}, a feature of the statistics{near(name, known)}")
        return chosen

    def _likely(self, learned: Learned) -> list[str]:
        """The columns that statistics without names must be of, where that is plain."""
        schema = self.typed([])
        lists = [f.name for f in schema if list_item(f.type) is not None and number_type(list_item(f.type)) is not None]
        numbers = [f.name for f in schema if self.kind == "CSV" or number_type(f.type) is not None]
        if len(numbers) == learned.width:
            return numbers
        if len(lists) == 1:
            return lists
        raise ShapeError(
            f"{self.path}: the statistics are of {learned.width} features without names, and here are {len(numbers)} "
            f"columns they may be ({listed(numbers)}): say with columns which"
        )


def open_reader(path: Path, learned: Learned, columns: Sequence[str] | None, batch_rows: int | None) -> Reader:
    """A reader of ``path``, whose data are those of the statistics as far as names and widths tell.

    Raises InputError, ShapeError where they are not, or the file is none.
    """
    from batchnorm.preprocessing.sinks.tablefiles import READERS

    kind = READERS.get(str(kind_of(str(path))))
    if kind is not None:
        reader = kind(path)
        reader.choose(learned, columns, batch_rows)
        return reader
    return ArrayReader(path, open_source(str(path), columns=columns, batch_rows=batch_rows))


def columns_of(path: Path) -> list[str]:
    """The names of all columns of a file. Raises InputError where it has none."""
    from batchnorm.preprocessing.sinks.tablefiles import READERS

    kind = READERS.get(str(kind_of(str(path))))
    if kind is None:
        raise InputError(f"{path}: this kind of file has no columns with names")
    with reading(str(path), kind.kind):
        return kind(path).look()
