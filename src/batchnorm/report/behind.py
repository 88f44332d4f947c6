"""The numbers behind a figure: as tables to read, and as CSV to keep.

The CSV holds every number, one row for each, with the six digits that the plots have too (the records have all). The
tables are to be read: of a long curve they have every few rows, and say so.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from batchnorm.report.numbers import number, plain
from batchnorm.report.traces import rounded
from batchnorm.study import records as records_module
from batchnorm.study.document import Cell, Figure, Series, Table

# Of more rows every second, third, ... is shown; of more columns of a grid likewise.
_ROWS, _COLUMNS = 40, 12
# Records that take more than this are left beside the page.
_MOST_BYTES = 500_000
# Characters from which on a CSV is compressed.
_LONG = 4000
_RECORD_COLUMNS = ("section", "variant", "seed", "step", "metric", "value", "run")


def tables(figure: Figure) -> list[Table]:
    """What ``figure`` shows, as tables: a value has its spread over seeds beside it, in brackets."""
    grids = [series for series in figure.series if series.z is not None]
    rest = [series for series in figure.series if series.z is None]
    found = [_grid(figure, series) for series in grids]
    if rest and figure.kind in ("lines", "bars"):
        found.append(_wide(figure, rest))
    elif rest:
        found.append(_long(figure, rest))
    return found


def rows(figure: Figure) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """Every number of ``figure``: the names of the columns, and a row for each value.

    Of a grid they are ``series, x, y, value``, else ``series, x, y, low, high``.
    """
    found: list[tuple[Cell, ...]] = []
    if any(series.z is not None for series in figure.series):
        for series in figure.series:
            if series.z is None:
                found += [(series.name, x, y, None) for x, y in zip(series.x, series.y, strict=True)]
            else:
                found += [
                    (series.name, x, y, value)
                    for y, row in zip(series.y, series.z, strict=True)
                    for x, value in zip(series.x, row, strict=True)
                ]
        return ("series", "x", "y", "value"), found
    for series in figure.series:
        nothing: tuple[None, ...] = (None,) * len(series.x)
        ends = zip(series.x, series.y, series.low or nothing, series.high or nothing, strict=True)
        found += [(series.name, *values) for values in ends]
    return ("series", "x", "y", "low", "high"), found


def text(columns: Sequence[str], cells: Iterable[Sequence[Cell]]) -> str:
    """CSV with a head; numbers as they are, nothing where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(cells)
    return out.getvalue()


def link(columns: Sequence[str], cells: Iterable[Sequence[Cell]]) -> str:
    """The CSV as the address of a link: a page from disk can save it, with and without JavaScript.

    A long one is compressed; the page's script unpacks it before it is saved.
    """
    brief = ([rounded(cell) if isinstance(cell, float) else cell for cell in row] for row in cells)
    whole = text(columns, brief)
    if len(whole) > _LONG:
        return _packed(gzip.compress(whole.encode(), 9, mtime=0))
    return "data:text/csv;charset=utf-8," + quote(whole, safe=",:/()[]=+*!;@")


def records_link(path: Path | None) -> str | None:
    """All records of the file ``path`` as a compressed CSV in a link; None where they are too many for a page.

    Raises:
        RecordsError: as :func:`batchnorm.study.records.read`.
    """
    if path is None or not path.is_file():
        return None
    found = records_module.read(path)
    columns = tuple(dict.fromkeys((*_RECORD_COLUMNS, *(key for line in found for key in line))))
    whole = text(columns, ([line.get(name) for name in columns] for line in found))
    packed = gzip.compress(whole.encode(), 9, mtime=0)
    return None if len(packed) > _MOST_BYTES else _packed(packed)


def _packed(data: bytes) -> str:
    return "data:application/gzip;base64," + base64.b64encode(data).decode()


def _wide(figure: Figure, series: Sequence[Series]) -> Table:
    """A row for each place, a column for each series."""
    places = list(dict.fromkeys(place for item in series for place in item.x))
    if all(isinstance(place, int | float) for place in places):
        places.sort(key=float)
    cells = [{place: _value(item, at) for at, place in enumerate(item.x)} for item in series]
    every = _every(len(places), _ROWS)
    body: tuple[tuple[Cell, ...], ...] = tuple(
        (place, *(known.get(place) for known in cells)) for place in places[::every]
    )
    head = (figure.x_label or "x", *(item.name for item in series))
    spread = any(item.low is not None for item in series)
    note = f"{figure.y_label or 'Values'}{', with the least and the greatest over seeds' if spread else ''}."
    return Table(figure.title, head, body, note + _left_out(every, len(places)))


def _long(figure: Figure, series: Sequence[Series]) -> Table:
    """A row for each point: two series of points share no places."""
    found: list[tuple[Cell, ...]] = [
        (item.name, place, _value(item, at)) for item in series for at, place in enumerate(item.x)
    ]
    every = _every(len(found), _ROWS)
    head = ("series", figure.x_label or "x", figure.y_label or "y")
    return Table(figure.title, head, tuple(found[::every]), _left_out(every, len(found)).strip())


def _grid(figure: Figure, series: Series) -> Table:
    down, across = _every(len(series.y), _ROWS // 2), _every(len(series.x), _COLUMNS)
    corner = f"{figure.y_label or 'y'} by {figure.x_label or 'x'}"
    head = (corner, *(_name(place) for place in series.x[::across]))
    body: tuple[tuple[Cell, ...], ...] = tuple(
        (_name(place), *row[::across]) for place, row in list(zip(series.y, series.z or (), strict=True))[::down]
    )
    thinned = max(down, across) > 1
    note = f"Every {_ordinal(down)} row and {_ordinal(across)} column; the CSV has all." if thinned else ""
    return Table(f"{figure.title}: {series.name}", head, body, note)


def _value(series: Series, at: int) -> str | None:
    value = series.y[at]
    if series.low is None or series.high is None:
        return None if value is None else number(value)
    low, high = series.low[at], series.high[at]
    middle = series.missing if value is None else number(value)
    if low is None:
        return None if value is None else middle
    return middle if low == high else f"{middle} [{number(low)}, {'open' if high is None else number(high)}]"


def _name(place: float | str | None) -> str:
    return place if isinstance(place, str) else "" if place is None else plain(place)


def _every(count: int, most: int) -> int:
    return max(1, -(-count // most))


def _left_out(every: int, count: int) -> str:
    return f" Every {_ordinal(every)} of {count:,} rows; the CSV has all." if every > 1 else ""


def _ordinal(value: int) -> str:
    ending = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value}{ending}"
