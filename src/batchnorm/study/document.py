"""What a study has to say, in a form that any page or terminal can draw.

The study decides what is said and with which numbers; the report decides how it looks. Between them stands this
document: plain data, no torch, no plot library, written to and read from ``summary.json`` without loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from batchnorm._errors import RecordsError

VERSION = 1

Cell = str | int | float | None


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds: ``median`` and the range, with the values themselves, one per seed.

    A seed that never reached what was asked has the value None. Where None values are so many that the median falls
    among them, ``median`` is None; ``high`` is None as soon as one value is (the range is open above).
    """

    median: float | None
    low: float | None
    high: float | None
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Series:
    """One line, group of bars, set of points or grid of a figure.

    ``low`` and ``high`` span the spread over seeds around ``y`` (same length), drawn as a band or as whiskers. A series
    of kind "heatmap" has ``z``, rows of values over ``y`` by ``x``. ``role`` says what a series stands for, so that the
    same thing has the same colour on the whole page. ``missing`` is what a bar without a value is labelled with.
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] | None = None
    high: tuple[float | None, ...] | None = None
    z: tuple[tuple[float, ...], ...] | None = None
    role: Literal["none", "batch", "control", "other", "data-a", "data-b"] = "other"
    dash: bool = False
    missing: str = "never"


@dataclass(frozen=True)
class Figure:
    """One plot. ``alt`` tells in words what is to be seen in it, for those who cannot see it."""

    id: str
    kind: Literal["lines", "bars", "points", "heatmap"]
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str
    alt: str
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table:
    """Numbers with their spread over seeds. Numeric cells are numbers; ``None`` is 'never' or 'not applicable'."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One question, answered.

    ``headline`` is a single sentence with the measured figures; ``shows`` and ``does_not_show`` are sentences;
    ``setup`` is the exact set-up, name to value.
    """

    name: str
    title: str
    question: str
    headline: str
    shows: tuple[str, ...]
    does_not_show: tuple[str, ...]
    setup: Mapping[str, Cell]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class Summary:
    """A whole run. ``speedup_90`` holds the headline ratio as data, None where that section did not run.

    Its keys: ``ratio``, ``baseline_steps``, ``bn_steps`` (each a :class:`Spread` as a mapping), ``baseline_lr``,
    ``bn_lr``, ``threshold``, ``seeds``. ``kind`` is what ran; of a comparison of a user's own network ``verdict``
    is its :class:`batchnorm.study.comparison.Verdict` as a mapping, whose ``text`` and ``judgements`` belong on top.
    """

    title: str
    command: str
    complete: bool
    seconds: float
    environment: Mapping[str, Cell]
    config: Mapping[str, Any]
    overview: Table
    sections: tuple[Section, ...]
    speedup_90: Mapping[str, Any] | None = None
    kind: Literal["study", "comparison"] = "study"
    verdict: Mapping[str, Any] | None = None
    version: int = field(default=VERSION)

    def to_json(self) -> str:
        """The document as JSON text (``NaN`` and infinities are refused: JSON has none)."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """Read what :meth:`to_json` wrote.

        Raises:
            RecordsError: the text is not such a document, or of another version.
        """
        try:
            raw = json.loads(text)
            if raw.get("version") != VERSION:
                raise RecordsError(
                    f"expected a summary of version {VERSION}, got {raw.get('version')!r}: rebuild it from the records"
                )
            sections = tuple(_section(item) for item in raw.pop("sections"))
            overview = _table(raw.pop("overview"))
            return cls(sections=sections, overview=overview, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, RecordsError):
                raise
            raise RecordsError(f"expected a study's summary, got something else: {error}") from error


def _section(raw: dict[str, Any]) -> Section:
    figures = tuple(_figure(item) for item in raw.pop("figures"))
    tables = tuple(_table(item) for item in raw.pop("tables"))
    return Section(
        figures=figures,
        tables=tables,
        shows=tuple(raw.pop("shows")),
        does_not_show=tuple(raw.pop("does_not_show")),
        **raw,
    )


def _figure(raw: dict[str, Any]) -> Figure:
    series = tuple(Series(**{key: _tuples(value) for key, value in item.items()}) for item in raw.pop("series"))
    return Figure(series=series, **{key: _tuples(value) for key, value in raw.items()})


def _table(raw: dict[str, Any]) -> Table:
    return Table(**{key: _tuples(value) for key, value in raw.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
