"""From a study's figure to what plotly draws.

Titles, axis labels and the legend are not drawn by plotly but are HTML around the plot: they wrap on a phone, can be
reached by keyboard and read aloud. Colours stay names of CSS variables here, see :mod:`batchnorm.report.palette`.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm._errors import MissingDependencyError
from batchnorm.report import palette
from batchnorm.report.numbers import number
from batchnorm.study.document import Figure, Series

_DASHES = ("solid", "dot", "dashdot", "longdash")
_FEW_POINTS = 30
_MANY_POINTS = 60
_SMALL_GRID = 16
_LONG_LABEL = 14
# Names of lying bars: characters a line and lines, so that they leave room for the bars on a phone.
_LABEL_WIDTH, _LABEL_LINES = 20, 3


@dataclass(frozen=True)
class Key:
    """One entry of a figure's legend; the button that shows and hides series ``index``."""

    index: int
    name: str
    colour: str
    mark: str
    dash: str


@dataclass(frozen=True)
class Panel:
    """One drawn plot: plotly's data and layout. A figure of several grids has one panel for each."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A figure, ready for the page.

    ``flipped`` tells that bars lie, so that the axes' labels change places; ``height`` is then what they need, in
    pixels. ``scale`` holds the ends of the colours that several grids share.
    """

    panels: tuple[Panel, ...]
    legend: tuple[Key, ...]
    flipped: bool
    height: int | None
    scale: tuple[str, str] | None


def plot(figure: Figure) -> Plot:
    """Turn ``figure`` into plotly data and layouts.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    keys = _keys(figure)
    flipped = figure.kind == "bars" and _wants_room(figure.series)
    if figure.kind == "heatmap":
        panels = _grids(figure, keys)
    else:
        draw = {"lines": _line, "bars": _lying_bars if flipped else _bars, "points": _points}[figure.kind]
        data = [trace for series, key in zip(figure.series, keys, strict=True) for trace in draw(series, key)]
        if figure.kind == "lines":
            # Bands first: no line is hidden under the spread of another.
            data.sort(key=lambda trace: trace.get("fill") != "toself")
        panels = (Panel("", *_checked(data, _layout(figure, flipped))),)
    legend = tuple(key for series, key in zip(figure.series, keys, strict=True) if series.z is None)
    return Plot(
        panels,
        legend if len(legend) > 1 else (),
        flipped,
        _height(figure.series) if flipped else None,
        _ends(_cells(figure)) if len(panels) > 1 else None,
    )


def _keys(figure: Figure) -> list[Key]:
    seen: Counter[str] = Counter()
    keys = []
    for index, series in enumerate(figure.series):
        turn = seen[series.role]
        seen[series.role] += 1
        dash = "dash" if series.dash else _DASHES[turn // len(palette.ROLES[series.role]) % len(_DASHES)]
        mark = {"lines": "line", "bars": "bar"}.get(figure.kind, "point")
        keys.append(Key(index, series.name, palette.shade(series.role, turn), mark, dash))
    return keys


def _line(series: Series, key: Key) -> Iterable[dict[str, Any]]:
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
                "fillcolor": key.colour.replace(")", "-band)"),
                "hoverinfo": "skip",
                "meta": {"series": key.index, "band": True},
                "name": _text(series.name),
                "showlegend": False,
            }
    yield {
        "type": "scatter",
        "x": _places(series.x),
        "y": [_short(value) for value in series.y],
        # Two points are a mark to compare with, many are a curve; markers are for measurements few enough to count.
        "mode": "lines+markers" if 2 < len(series.x) <= _FEW_POINTS else "lines",
        "line": {"color": key.colour, "width": 2.25, "dash": key.dash},
        "marker": {"color": key.colour, "size": 6},
        **_hover(series, key, "%{y:.4~g}"),
    }


def _points(series: Series, key: Key) -> Iterable[dict[str, Any]]:
    many = len(series.x) > _MANY_POINTS
    yield {
        "type": "scatter",
        "x": _places(series.x),
        "y": [_short(value) for value in series.y],
        "mode": "markers",
        "marker": {
            "color": key.colour,
            "size": 5 if many else 9,
            "line": {"color": "var(--surface)", "width": 0 if many else 1},
        },
        "error_y": _whiskers(series),
        **_hover(series, key, "%{x}, %{y:.4~g}"),
    }


def _lying_bars(series: Series, key: Key) -> Iterable[dict[str, Any]]:
    return _bars(series, key, flipped=True)


def _bars(series: Series, key: Key, flipped: bool = False) -> Iterable[dict[str, Any]]:
    places = _places(series.x)
    values = [_short(value) for value in series.y]
    group = {"offsetgroup": str(key.index), "alignmentgroup": "all", "orientation": "h" if flipped else "v"}
    yield {
        "type": "bar",
        "x": values if flipped else places,
        "y": places if flipped else values,
        "marker": {"color": key.colour, "pattern": {"shape": "/" if series.dash else "", "size": 6, "solidity": 0.25}},
        "error_x" if flipped else "error_y": _whiskers(series),
        **group,
        **_hover(series, key, "%{x:.4~g}" if flipped else "%{y:.4~g}"),
    }
    # The number stands beyond the whisker, which would cross it anywhere else.
    tops = [_short(y) if high is None else _rounded(max(high, y or high)) for y, high in _pairs(series)]
    ends = [0 if value is None else top for value, top in zip(values, tops, strict=True)]
    yield {
        "type": "scatter",
        "mode": "text",
        "x": ends if flipped else places,
        "y": places if flipped else ends,
        "text": [" never" if value is None else f" {number(value)} " for value in values],
        "textposition": "middle right" if flipped else "top center",
        "textfont": {"color": "var(--ink)", "size": 12},
        "cliponaxis": False,
        "hoverinfo": "skip",
        "meta": {"series": key.index, "band": True},
        "showlegend": False,
        **group,
    }


def _grids(figure: Figure, keys: Sequence[Key]) -> tuple[Panel, ...]:
    grids = [(series, key) for series, key in zip(figure.series, keys, strict=True) if series.z is not None]
    cells = _cells(figure)
    over = [
        trace
        for series, key in zip(figure.series, keys, strict=True)
        if series.z is None
        for trace in _points(series, key)
    ]
    for trace in over:
        # A dot must be told from a ground of any shade.
        trace["marker"] |= {"size": 6, "line": {"color": "var(--surface)", "width": 1}}
    panels = []
    for series, _ in grids:
        rows = [[_short(value) for value in row] for row in series.z or ()]
        small = len(series.x) <= _SMALL_GRID and len(series.y) <= _SMALL_GRID
        grid = {
            "type": "heatmap",
            # A small grid is a table: its rows and columns are names, evenly spaced, with the numbers written in.
            "x": [_label(place) for place in series.x] if small else _places(series.x),
            "y": [_label(place) for place in series.y] if small else _places(series.y),
            "z": rows,
            "zmin": cells[0],
            "zmax": cells[-1],
            "colorscale": [
                [step / (len(palette.HEAT) - 1), f"var(--heat-{step})"] for step in range(len(palette.HEAT))
            ],
            "showscale": len(grids) == 1,
            "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 1},
            "texttemplate": "%{z:.3~g}" if small else "",
            "hovertemplate": "%{x}, %{y}: <b>%{z:.4~g}</b><extra></extra>",
            "name": _text(series.name),
            "meta": {"grid": True},
            "xgap": 1 if small else 0,
            "ygap": 1 if small else 0,
        }
        layout = _layout(figure, False)
        if small:
            layout["xaxis"].update(type="category", showgrid=False)
            layout["yaxis"].update(type="category", showgrid=False)
        panels.append(Panel(series.name, *_checked([grid, *over], layout)))
    return tuple(panels)


def _cells(figure: Figure) -> list[float]:
    return sorted(value for series in figure.series for row in series.z or () for value in row)


def _ends(cells: Sequence[float]) -> tuple[str, str]:
    """Least and greatest, to a hundredth of what lies between: 3e-11 to 1 is 0 to 1."""
    places = 2 - math.floor(math.log10((cells[-1] - cells[0]) or 1.0))
    return number(round(cells[0], places)), number(round(cells[-1], places))


def _layout(figure: Figure, flipped: bool) -> dict[str, Any]:
    names = [value for series in figure.series for value in series.x if isinstance(value, str)]
    across: dict[str, Any] = {**_axis(), "type": "category" if names else "log" if figure.log_x else "linear"}
    up: dict[str, Any] = {**_axis(), "type": "log" if figure.log_y else "linear"}
    if figure.y_range is not None:
        up["range"] = [math.log10(end) if figure.log_y else end for end in figure.y_range]
    elif figure.kind == "bars" and not figure.log_y:
        up["rangemode"] = "tozero"
    for axis, values in (
        (across, [place for series in figure.series for place in series.x]),
        (up, [place for series in figure.series for place in series.y]),
    ):
        if axis["type"] == "log":
            axis.update(_decades(values))
    if names and figure.kind != "heatmap":
        across["showgrid"] = False
        order = list(dict.fromkeys(names))
        across.update(
            tickmode="array",
            tickvals=[_text(name) for name in order],
            ticktext=["<br>".join(_text(line) for line in _wrapped(name)) for name in order],
        )
    if flipped:
        across["autorange"] = "reversed"
    if any(series.role in ("data-a", "data-b") for series in figure.series) and figure.kind != "bars" and not names:
        # Points of data: a step to the right is as long as a step up.
        up.update(scaleanchor="x", constrain="domain")
        across["constrain"] = "domain"
    return {
        "xaxis": up if flipped else across,
        "yaxis": across if flipped else up,
        "margin": {"l": 8, "r": 44 if flipped else 12, "t": 20 if figure.kind == "bars" else 12, "b": 8},
        "font": {"color": "var(--ink)", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "hovermode": "x unified" if figure.kind == "lines" else "closest",
        "showlegend": False,
        "barmode": "group",
        "bargap": 0.3,
        "bargroupgap": 0.08,
        "scattermode": "group" if figure.kind == "bars" else "overlay",
        "scattergap": 0.3,
        "autosize": True,
        # Else plotly adds its own template, 7 KB a plot.
        "template": {},
    }


def _decades(values: Sequence[float | str | None]) -> dict[str, Any]:
    """Ticks at 1, 10, 100 where the values span decades; plotly's own, with digits between, where they do not."""
    found = [value for value in values if isinstance(value, int | float) and value > 0]
    if not found or max(found) < 50 * min(found):
        return {}
    readable = min(found) >= 1e-3 and max(found) < 1e6
    return {"dtick": 1, "minor": {"dtick": "D1", "ticks": ""}, **({"tickformat": ",.4~g"} if readable else {})}


def _axis() -> dict[str, Any]:
    return {
        "automargin": True,
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "tickfont": {"color": "var(--muted)", "size": 12},
        "exponentformat": "power",
        "fixedrange": False,
    }


def _checked(data: list[dict[str, Any]], layout: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Let plotly check every name and value, so that a misspelt option fails here and not silently in the browser."""
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingDependencyError(
            "the report's page needs plotly, which is not installed: pip install 'batchnorm[report]'"
        ) from error
    checked = go.Figure(data=data, layout=layout).to_plotly_json()
    return checked["data"], checked["layout"]


def _hover(series: Series, key: Key, value: str) -> dict[str, Any]:
    spread = [""] * len(series.y)
    if series.low is not None and series.high is not None:
        ends = zip(series.low, series.high, strict=True)
        spread = ["" if low is None else f" ({number(low)} \u2013 {_open(high)})" for low, high in ends]
    return {
        "name": _text(series.name),
        "customdata": spread,
        "hovertemplate": f"<b>{value}</b>%{{customdata}}<extra>%{{fullData.name}}</extra>",
        "meta": {"series": key.index, "band": False},
    }


def _open(high: float | None) -> str:
    return "never" if high is None else number(high)


def _pairs(series: Series) -> list[tuple[float | None, float | None]]:
    return list(zip(series.y, series.high or [None] * len(series.y), strict=True))


def _whiskers(series: Series) -> dict[str, Any]:
    if series.low is None or series.high is None:
        return {"visible": False}
    above = [
        0 if y is None or high is None else _short(high - y) for y, high in zip(series.y, series.high, strict=True)
    ]
    below = [0 if y is None or low is None else _short(y - low) for y, low in zip(series.y, series.low, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": "var(--ink)",
        "thickness": 1.25,
        "width": 4,
    }


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

    for place, bottom, top in zip(_places(x), low, high, strict=True):
        if bottom is None or top is None:
            close()
        else:
            stretch.append((place, _rounded(bottom), _rounded(top)))
    close()
    return xs, ys


def _wants_room(series: Sequence[Series]) -> bool:
    """Bars lie down where their names are too long, or too many, to stand beside each other on a phone."""
    names = {value for item in series for value in item.x if isinstance(value, str)}
    return len(names) > 6 or any(len(name) > _LONG_LABEL for name in names)


def _places(values: Sequence[float | str | None]) -> list[Any]:
    return [_text(value) if isinstance(value, str) else _short(value) for value in values]


def _label(value: float | str | None) -> str:
    return _text(value) if isinstance(value, str) else f"{value:g}"


def _wrapped(name: str) -> list[str]:
    return textwrap.wrap(name, _LABEL_WIDTH, max_lines=_LABEL_LINES, placeholder=" \u2026") or [""]


def _height(series: Sequence[Series]) -> int:
    names = dict.fromkeys(str(value) for item in series for value in item.x)
    row = max(max(len(_wrapped(name)) for name in names) * 17 + 10, len(series) * 24 + 12)
    return 60 + row * len(names)


def _text(value: str) -> str:
    """Plotly takes text for a small HTML: what looks like a tag must be written as characters."""
    return html.escape(value, quote=False)


def _short(value: float | None) -> float | None:
    return None if value is None else _rounded(value)


def _rounded(value: float) -> float:
    # Six digits are more than a screen has pixels; the full ones would double the size of the page.
    return float(f"{value:.6g}") if isinstance(value, float) else value
