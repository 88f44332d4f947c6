"""One series of a study's figure as plotly's traces.

A trace says with ``meta`` which series it belongs to, so that the page's legend can hide all of them, and whether it
is only a companion (a band, the number on a bar) of the one that is hovered.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.report import palette
from batchnorm.report.numbers import number
from batchnorm.study.document import Series

_FEW_POINTS = 30
_MANY_POINTS = 60


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend; the button that shows and hides series ``index``."""

    index: int
    name: str
    colour: str
    mark: str
    dash: str


def line(series: Series, key: Key) -> Iterable[dict[str, Any]]:
    if series.low is not None and series.high is not None:
        xs, ys = _outline(series.x, series.low, series.high)
        if xs:
            yield {
                "type": "scatter",
                "x": xs,
                "y": ys,
                "mode": "lines",
                "line": {"width": 0, "color": key.colour},
                "fill": "toself",
                "fillcolor": palette.band(key.colour),
                "hoverinfo": "skip",
                "meta": {"series": key.index, "band": True},
                "name": text_of(series.name),
                "showlegend": False,
            }
    yield {
        "type": "scatter",
        "x": places(series.x),
        "y": [short(value) for value in series.y],
        # Two points are a mark to compare with, many are a curve; markers are for measurements few enough to count, and
        # for a single one, of which there is no line.
        "mode": "lines+markers" if len(series.x) <= _FEW_POINTS and len(series.x) != 2 else "lines",
        "line": {"color": key.colour, "width": 2.25, "dash": key.dash},
        "marker": {"color": key.colour, "size": 6},
        **_hover(series, key),
    }


def points(series: Series, key: Key) -> Iterable[dict[str, Any]]:
    many = len(series.x) > _MANY_POINTS
    yield {
        "type": "scatter",
        "x": places(series.x),
        "y": [short(value) for value in series.y],
        "mode": "markers",
        "marker": {
            "color": key.colour,
            "size": 5 if many else 9,
            "line": {"color": "var(--surface)", "width": 0 if many else 1},
        },
        "error_y": _whiskers(series),
        **_hover(series, key, "%{x}: "),
    }


def lying_bars(series: Series, key: Key) -> Iterable[dict[str, Any]]:
    return bars(series, key, flipped=True)


def bars(series: Series, key: Key, flipped: bool = False) -> Iterable[dict[str, Any]]:
    names = places(series.x)
    values = [short(value) for value in series.y]
    group = {"offsetgroup": str(key.index), "alignmentgroup": "all", "orientation": "h" if flipped else "v"}
    yield {
        "type": "bar",
        "x": values if flipped else names,
        "y": names if flipped else values,
        "marker": {"color": key.colour, "pattern": {"shape": "/" if series.dash else "", "size": 6, "solidity": 0.25}},
        "error_x" if flipped else "error_y": _whiskers(series),
        **group,
        **_hover(series, key),
    }
    # The number stands beyond the whisker, which would cross it anywhere else.
    tops = [short(y) if high is None else rounded(max(high, y or high)) for y, high in _pairs(series)]
    ends = [0 if value is None else top for value, top in zip(values, tops, strict=True)]
    yield {
        "type": "scatter",
        "mode": "text",
        "x": ends if flipped else names,
        "y": names if flipped else ends,
        "text": [f" {series.missing}" if value is None else f" {number(value)} " for value in values],
        "textposition": "middle right" if flipped else "top center",
        "textfont": {"color": "var(--ink)", "size": 12},
        "cliponaxis": False,
        "hoverinfo": "skip",
        "meta": {"series": key.index, "band": True},
        "showlegend": False,
        **group,
    }


def _hover(series: Series, key: Key, place: str = "") -> dict[str, Any]:
    spread = [""] * len(series.y)
    if series.low is not None and series.high is not None:
        ends = zip(series.low, series.high, strict=True)
        spread = ["" if low is None else f" ({number(low)} \u2013 {_open(high)})" for low, high in ends]
    # The numbers are written here, as the tables write them, and not by plotly's own rules.
    values = ["" if value is None else number(value) for value in series.y]
    return {
        "name": text_of(series.name),
        "customdata": [list(pair) for pair in zip(values, spread, strict=True)],
        "hovertemplate": f"{place}<b>%{{customdata[0]}}</b>%{{customdata[1]}}<extra>%{{fullData.name}}</extra>",
        "meta": {"series": key.index, "band": False},
    }


def _open(high: float | None) -> str:
    return "never" if high is None else number(high)


def _whiskers(series: Series) -> dict[str, Any]:
    if series.low is None or series.high is None:
        return {"visible": False}
    above = [0 if y is None or high is None else short(high - y) for y, high in zip(series.y, series.high, strict=True)]
    below = [0 if y is None or low is None else short(y - low) for y, low in zip(series.y, series.low, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": "var(--ink)",
        "thickness": 1.25,
        "width": 4,
    }


def _pairs(series: Series) -> list[tuple[float | None, float | None]]:
    return list(zip(series.y, series.high or [None] * len(series.y), strict=True))


def _outline(
    x: Sequence[float | str], low: Sequence[float | None], high: Sequence[float | None]
) -> tuple[list[float | str | None], list[float | None]]:
    """The border of the band, once around each stretch that has both ends, stretches parted by a gap."""
    xs: list[float | str | None] = []
    ys: list[float | None] = []
    stretch: list[tuple[float | str, float, float]] = []

    def close() -> None:
        if stretch:
            gap = [None] if xs else []
            places = [place for place, _, _ in stretch]
            xs.extend([*gap, *places, *reversed(places)])
            ys.extend([*gap, *(top for _, _, top in stretch), *(bottom for _, bottom, _ in reversed(stretch))])
            stretch.clear()

    for place, bottom, top in zip(places(x), low, high, strict=True):
        if bottom is None or top is None:
            close()
        else:
            stretch.append((place, rounded(bottom), rounded(top)))
    close()
    return xs, ys


def places(values: Sequence[float | str | None]) -> list[Any]:
    return [text_of(value) if isinstance(value, str) else short(value) for value in values]


def text_of(value: str) -> str:
    """Plotly takes text for a small HTML: what looks like a tag must be written as characters."""
    return html.escape(value, quote=False)


def short(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def rounded(value: float) -> float:
    # Six digits are more than a screen has pixels; the full ones would double the size of the page.
    return float(f"{value:.6g}") if isinstance(value, float) else value
