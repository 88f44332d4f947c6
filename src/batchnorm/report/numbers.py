"""How numbers are written, on the page and in the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.study.document import Cell

NOTHING = "\u2013"
_SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


def number(value: float) -> str:
    """About three significant digits: 654, 19.6, 2.07, 0.977, 1.8 × 10⁻⁷."""
    size = abs(value)
    if isinstance(value, int) or (value == int(value) and size < 1e6):
        return f"{int(value):,}"
    if size >= 1e6 or size < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits} \u00d7 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"{value:,.{_decimals(size)}f}"


def plain(value: Cell) -> str:
    """A value of a set-up as it was set, not rounded: 0.1, 2, 1e-05, yes."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) and f"{value:g}" == f"{value:.12g}" else str(value)


def column(cells: Sequence[Cell]) -> list[str]:
    """The cells of a column of a table, numbers with the same number of decimals where that loses nothing."""
    floats = [cell for cell in cells if isinstance(cell, float)]
    exact = max((_exact_decimals(value) for value in floats), default=0)
    # Three digits are enough to read; a column that would need more gets three of each number.
    short = exact == 0 or (exact <= 2 and all(abs(value) * 10**exact < 1000 for value in floats))
    return [_cell(cell, exact if short else None) for cell in cells]


def steps(value: float | None) -> str:
    """A number of steps; None is one that was never reached."""
    return "not reached" if value is None else number(round(value))


def spread(values: Mapping[str, Any]) -> str:
    """The range of a :class:`~batchnorm.study.document.Spread`, open above where a seed never arrived."""
    low, high = values["low"], values["high"]
    if low is None:
        return "no seed arrived"
    return f"{number(low)} and up" if high is None else f"{number(low)}\u2013{number(high)}"


def duration(seconds: float) -> str:
    """1 h 03 min, 1 min 48 s, 9.3 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers (or starts like one, as "654 [600, 700]" does), and so is set flush right."""
    filled = [cell for cell in cells if cell is not None and cell != ""]
    return bool(filled) and all(
        not isinstance(cell, bool)
        and (not isinstance(cell, str) or cell.lstrip("+-\u2212<>~\u2265\u2264 ")[:1].isdigit())
        for cell in filled
    )


def _cell(cell: Cell, decimals: int | None) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return plain(cell)
    if isinstance(cell, float) and decimals is not None and abs(cell) < 1e6:
        return f"{cell:,.{decimals}f}"
    return number(cell)


def _decimals(size: float) -> int:
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3


def _exact_decimals(value: float) -> int:
    """How many decimals say all of ``value``; many for what has no short form."""
    text = repr(value)
    if "e" in text:
        return 99
    fraction = text.partition(".")[2]
    return 0 if fraction == "0" else len(fraction)
