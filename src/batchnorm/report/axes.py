"""The axes and the layout of a study's figure, as plotly wants them."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from batchnorm.report.traces import text_of
from batchnorm.study.document import Figure, Series

_LONG_LABEL = 14
# Names of lying bars: characters a line and lines, so that they leave room for the bars on a phone.
_LABEL_WIDTH, _LABEL_LINES = 20, 3


def layout_of(figure: Figure, flipped: bool) -> dict[str, Any]:
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
        order = in_order(names)
        across.update(
            categoryorder="array",
            categoryarray=[text_of(name) for name in order],
            tickmode="array",
            tickvals=[text_of(name) for name in order],
            ticktext=["<br>".join(text_of(line) for line in wrapped(name)) for name in order],
        )
    if flipped:
        across["autorange"] = "reversed"
    if is_data_space(figure):
        up.update(scaleanchor="x", constrain="domain", constraintoward="top")
        across["constrain"] = "domain"
    return {
        "xaxis": up if flipped else across,
        "yaxis": across if flipped else up,
        "margin": {"l": 8, "r": 44 if flipped else 12, "t": 20 if figure.kind == "bars" else 12, "b": 8},
        "font": {"color": "var(--ink)", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--muted)", "activecolor": "var(--accent)"},
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


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once: by size where all are numbers (of two runs, each may have some), else as they come."""
    order = list(dict.fromkeys(names))
    with contextlib.suppress(ValueError):
        order.sort(key=float)
    return order


def _axis() -> dict[str, Any]:
    return {
        "automargin": True,
        "ticks": "",
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "tickfont": {"color": "var(--muted)", "size": 12},
        "exponentformat": "power",
        # Plotly's line through the hovered place has a white rim, which a dark page cannot take.
        "showspikes": False,
    }


def _decades(values: Sequence[float | str | None]) -> dict[str, Any]:
    """Ticks at 1, 10, 100 where the values span decades; plotly's own, with digits between, where they do not."""
    found = [value for value in values if isinstance(value, int | float) and value > 0]
    if not found or max(found) < 50 * min(found):
        return {}
    readable = min(found) >= 1e-3 and max(found) < 1e6
    return {"dtick": 1, "minor": {"dtick": "D1", "ticks": ""}, **({"tickformat": ",.4~g"} if readable else {})}


def wants_room(series: Sequence[Series]) -> bool:
    """Bars lie down where their names are too long, or too many, to stand beside each other on a phone."""
    names = {value for item in series for value in item.x if isinstance(value, str)}
    return len(names) > 6 or any(len(name) > _LONG_LABEL for name in names)


def is_data_space(figure: Figure) -> bool:
    """Whether the axes are two features of the data, so that a step to the right is as long as a step up."""
    return figure.kind in ("points", "heatmap") and any(series.role in ("data-a", "data-b") for series in figure.series)


def common_range(figures: Sequence[Figure]) -> tuple[float, float]:
    series = [item for figure in figures for item in figure.series]
    found = [
        value
        for item in series
        for ends in (item.y, item.low or (), item.high or ())
        for value in ends
        if value is not None and (value > 0 or not figures[0].log_y)
    ]
    low, high = min(found, default=0.0), max(found, default=1.0)
    if figures[0].log_y:
        return low / 1.2, high * 1.2
    margin = 0.05 * (high - low or 1.0)
    return low - margin, high + margin


def wrapped(name: str) -> list[str]:
    return textwrap.wrap(name, _LABEL_WIDTH, max_lines=_LABEL_LINES, placeholder=" \u2026") or [""]


def height_of(series: Sequence[Series]) -> int:
    names = dict.fromkeys(str(value) for item in series for value in item.x)
    row = max(max(len(wrapped(name)) for name in names) * 17 + 10, len(series) * 24 + 12)
    return 60 + row * len(names)
