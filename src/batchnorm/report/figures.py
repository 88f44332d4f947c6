"""From a study's figure to what plotly draws.

Titles, axis labels and the legend are not drawn by plotly but are HTML around the plot: they wrap on a phone, can be
reached by keyboard and read aloud. Colours stay names of CSS variables here, see :mod:`batchnorm.report.palette`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm._errors import MissingDependencyError
from batchnorm.report import palette
from batchnorm.report.axes import common_range, height_of, is_data_space, layout_of, wants_room
from batchnorm.report.numbers import number
from batchnorm.report.traces import Key, bars, line, lying_bars, places, points, short, text_of
from batchnorm.study.document import Figure

_DASHES = ("solid", "dot", "dashdot", "longdash")
_SMALL_GRID = 16


@dataclass(frozen=True)
class Panel:
    """One drawn plot: plotly's data and layout. A figure of several grids has one panel for each."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """A figure, ready for the page.

    ``figure`` is what is drawn, on the scale of its group. ``keys`` are the colours of all series, ``legend`` those
    that the page names. ``flipped`` tells that bars lie, so that the axes' labels change places; ``height`` is then
    what they need, in pixels. ``scale`` holds the ends of the colours that several grids share.
    """

    figure: Figure
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...]
    legend: tuple[Key, ...]
    flipped: bool
    height: int | None
    scale: tuple[str, str] | None


def peers(figures: Sequence[Figure]) -> list[list[Figure]]:
    """Put figures that follow each other and differ in one word together: "Regions: without", "Regions: BN".

    Such figures stand side by side on one scale, else the eye compares what cannot be compared.
    """
    groups: list[list[Figure]] = []
    for figure in figures:
        if groups and _family(groups[-1][-1]) == _family(figure):
            groups[-1].append(figure)
        else:
            groups.append([figure])
    return groups


def _family(figure: Figure) -> tuple[object, ...]:
    subject, colon, _ = figure.title.rpartition(": ")
    return (subject if colon else figure, figure.kind, figure.x_label, figure.y_label, figure.log_x, figure.log_y)


def plot(figure: Figure, group: Sequence[Figure] = ()) -> Plot:
    """Turn ``figure`` into plotly data and layouts, on one scale with the figures of its ``group``.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    if len(group) > 1 and figure.kind == "lines" and all(item.y_range is None for item in group):
        figure = dataclasses.replace(figure, y_range=common_range(group))
    keys = _keys(figure)
    flipped = figure.kind == "bars" and wants_room(figure.series)
    if figure.kind == "heatmap":
        panels = _grids(figure, keys, cells := _cells(group or [figure]))
    else:
        draw = {"lines": line, "bars": lying_bars if flipped else bars, "points": points}[figure.kind]
        data = [trace for series, key in zip(figure.series, keys, strict=True) for trace in draw(series, key)]
        if figure.kind == "lines":
            # Bands first: no line is hidden under the spread of another.
            data.sort(key=lambda trace: trace.get("fill") != "toself")
        panels = (Panel("", *_checked(data, layout_of(figure, flipped))),)
    legend = tuple(key for series, key in zip(figure.series, keys, strict=True) if series.z is None)
    return Plot(
        figure,
        panels,
        tuple(keys),
        legend if len(legend) > 1 else (),
        flipped,
        height_of(figure.series) if flipped else None,
        _ends(cells) if figure.kind == "heatmap" and not _has_own_scale(figure) else None,
    )


def _keys(figure: Figure) -> list[Key]:
    seen: Counter[str] = Counter()
    keys = []
    for index, series in enumerate(figure.series):
        turn = seen[series.role]
        seen[series.role] += 1
        # Those of other kinds have nothing but their hue in common with themselves: each gets a dash as well.
        step = turn if series.role == "other" else turn // len(palette.ROLES[series.role])
        dash = "dash" if series.dash else _DASHES[step % len(_DASHES)]
        mark = {"lines": "line", "bars": "bar"}.get(figure.kind, "point")
        keys.append(Key(index, series.name, palette.shade(series.role, turn), mark, dash))
    return keys


def _grids(figure: Figure, keys: Sequence[Key], cells: Sequence[float]) -> tuple[Panel, ...]:
    grids = [(series, key) for series, key in zip(figure.series, keys, strict=True) if series.z is not None]
    over = [
        trace
        for series, key in zip(figure.series, keys, strict=True)
        if series.z is None
        for trace in points(series, key)
    ]
    for trace in over:
        # A dot must be told from a ground of any shade.
        trace["marker"] |= {"size": 6, "line": {"color": "var(--surface)", "width": 1}}
    panels = []
    for series, _ in grids:
        rows = [[short(value) for value in row] for row in series.z or ()]
        small = len(series.x) <= _SMALL_GRID and len(series.y) <= _SMALL_GRID
        grid = {
            "type": "heatmap",
            # A small grid is a table: its rows and columns are names, evenly spaced, with the numbers written in.
            "x": [_label(place) for place in series.x] if small else places(series.x),
            "y": [_label(place) for place in series.y] if small else places(series.y),
            "z": rows,
            "zmin": cells[0],
            "zmax": cells[-1],
            "colorscale": [
                [step / (len(palette.HEAT) - 1), f"var(--heat-{step})"] for step in range(len(palette.HEAT))
            ],
            "showscale": _has_own_scale(figure),
            "colorbar": {"thickness": 10, "outlinewidth": 0, "len": 1},
            "texttemplate": "%{z:.3~g}" if small else "",
            "hovertemplate": "%{x}, %{y}: <b>%{z:.4~g}</b><extra></extra>",
            "name": text_of(series.name),
            "meta": {"grid": True},
            "xgap": 1 if small else 0,
            "ygap": 1 if small else 0,
        }
        layout = layout_of(figure, False)
        if small:
            layout["xaxis"].update(type="category", showgrid=False)
            layout["yaxis"].update(type="category", showgrid=False)
        panels.append(Panel(series.name, *_checked([grid, *over], layout)))
    return tuple(panels)


def _cells(figures: Sequence[Figure]) -> list[float]:
    return sorted(value for figure in figures for series in figure.series for row in series.z or () for value in row)


def _has_own_scale(figure: Figure) -> bool:
    """Whether plotly draws the scale of colours, beside a grid that is as wide as the page."""
    return len([series for series in figure.series if series.z is not None]) == 1 and not is_data_space(figure)


def _ends(cells: Sequence[float]) -> tuple[str, str]:
    """Least and greatest, to a hundredth of what lies between: 3e-11 to 1 is 0 to 1."""
    places = 2 - math.floor(math.log10((cells[-1] - cells[0]) or 1.0))
    return number(round(cells[0], places)), number(round(cells[-1], places))


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


def _label(value: float | str | None) -> str:
    return text_of(value) if isinstance(value, str) else f"{value:g}"
