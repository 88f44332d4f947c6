"""The same figures as still pictures, for paper and for a reader without JavaScript: SVG by matplotlib.

Colours are the page's CSS variables here too, so that a picture follows the theme. matplotlib knows no variables: it
gets a colour of its own for each, which is replaced in what it wrote. The same figure gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchnorm._errors import MissingDependencyError
from batchnorm.report import palette
from batchnorm.report.axes import in_order, is_data_space, wrapped
from batchnorm.report.numbers import number
from batchnorm.report.traces import Key
from batchnorm.study.document import Figure, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = tuple(palette.variables(dark=False))
# Not a colour of the page, six digits, one for each variable.
_STAND_INS = {name: f"#fe{index:04x}" for index, name in enumerate(_NAMES)}
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (6, 3)),
    "dot": (0, (1.5, 2)),
    "dashdot": (0, (6, 2, 1.5, 2)),
    "longdash": (0, (9, 3)),
}
_MOST_NAMES = 16
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    # A dollar is a dollar.
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "path.simplify_threshold": 0.5,
}


def still(figure: Figure, keys: Sequence[Key], flipped: bool = False, name: str = "") -> str:
    """The picture of ``figure`` as SVG text.

    ``keys`` are the colours and dashes of its series; ``name`` keeps the ids inside apart from those of other pictures
    on the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingDependencyError(
            "the report's still pictures need matplotlib, which is not installed: pip install 'batchnorm[report]'"
        ) from error
    colours = {"axes.edgecolor": _of("line"), "axes.labelcolor": _of("muted"), "text.color": _of("ink")}
    colours |= {"xtick.color": _of("line"), "ytick.color": _of("line"), "grid.color": _of("grid")}
    colours |= {"xtick.labelcolor": _of("muted"), "ytick.labelcolor": _of("muted")}
    # Any: matplotlib's type of it lists the names of all its settings.
    style: Any = {**_STYLE, **colours, "svg.hashsalt": name or figure.id}
    with mpl.rc_context(style):
        grids = [series for series in figure.series if series.z is not None]
        count = max(1, len(grids))
        names = len({name for series in figure.series for name in series.x})
        height = 1.0 + 0.34 * names + 0.12 * names * len(figure.series) if flipped else 3.4
        canvas = Canvas(figsize=(7.0, min(height, 9.0)), layout="constrained", facecolor="none")
        axes = canvas.subplots(1, count, squeeze=False)[0]
        if grids:
            for place, grid in zip(axes, grids, strict=True):
                _heat(place, figure, grid, keys)
                place.set_title(_text(grid.name) if count > 1 else "", fontsize=9)
        else:
            _draw(axes[0], figure, keys, flipped)
        for place in axes:
            place.set_facecolor("none")
            across, up = (figure.y_label, figure.x_label) if flipped else (figure.x_label, figure.y_label)
            place.set_xlabel(_text(across))
            place.set_ylabel(_text(up))
        if sum(series.z is None for series in figure.series) > 1:
            canvas.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
        text = io.StringIO()
        canvas.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _tidied(text.getvalue())


def _draw(axes: Axes, figure: Figure, keys: Sequence[Key], flipped: bool) -> None:
    from matplotlib.ticker import NullFormatter

    names = in_order(name for series in figure.series for name in series.x if isinstance(name, str))
    axes.set_axisbelow(True)
    axes.grid(axis="x" if flipped else "y" if names else "both", linewidth=0.8)
    if figure.log_x and not names:
        axes.set_xscale("log")
    for index, (series, key) in enumerate(zip(figure.series, keys, strict=True)):
        x = [float(names.index(place)) if isinstance(place, str) else place for place in series.x]
        if figure.kind == "bars":
            _bars(axes, series, key, x, (index, len(figure.series)), flipped)
        else:
            _line(axes, series, key, x, figure.kind == "points")
    if names:
        labels = ["\n".join(wrapped(_text(name))) for name in names]
        (axes.set_yticks if flipped else axes.set_xticks)(range(len(names)), labels)
    if flipped:
        axes.invert_yaxis()
    if figure.log_y:
        (axes.set_xscale if flipped else axes.set_yscale)("log")
    for axis, logarithmic in ((axes.xaxis, axes.get_xscale() == "log"), (axes.yaxis, axes.get_yscale() == "log")):
        if logarithmic:
            axis.set_major_formatter(lambda value, _: number(value))
            axis.set_minor_formatter(NullFormatter())
    if figure.y_range is not None:
        (axes.set_xlim if flipped else axes.set_ylim)(*figure.y_range)
    elif figure.kind == "bars" and not figure.log_y:
        axes.margins(x=0.12 if flipped else None, y=None if flipped else 0.12)
    if is_data_space(figure):
        axes.set_aspect("equal")


def _line(axes: Axes, series: Series, key: Key, x: list[float], dots: bool) -> None:
    colour = _variable(key.colour)
    y = _numbers(series.y)
    if dots:
        axes.errorbar(
            x,
            y,
            yerr=_whiskers(series),
            fmt="o",
            markersize=4,
            color=colour,
            elinewidth=1,
            capsize=2,
            label=_text(series.name),
        )
        return
    if series.low is not None and series.high is not None:
        axes.fill_between(
            x, _numbers(series.low), _numbers(series.high), facecolor=colour, alpha=0.16, linewidth=0, label="_band"
        )
    mark = "o" if len(x) == 1 else ""
    axes.plot(x, y, color=colour, linestyle=_DASHES[key.dash], linewidth=1.6, marker=mark, label=_text(series.name))


def _bars(axes: Axes, series: Series, key: Key, x: list[float], turn: tuple[int, int], flipped: bool) -> None:
    index, count = turn
    width = 0.72 / count
    places = [place + (index - (count - 1) / 2) * width for place in x]
    values = [0.0 if value is None else value for value in series.y]
    options: dict[str, Any] = {
        "color": _variable(key.colour),
        "label": _text(series.name),
        "hatch": "//" if series.dash else "",
    }
    options |= {"xerr" if flipped else "yerr": _whiskers(series), "ecolor": _of("ink"), "capsize": 2}
    options["error_kw"] = {"elinewidth": 1}
    draw: Any = axes.barh if flipped else axes.bar
    held = draw(places, values, **({"height": width} if flipped else {"width": width}), **options)
    labels = [series.missing if value is None else number(value) for value in series.y]
    axes.bar_label(held, labels, padding=3, fontsize=8, color=_of("ink"))


def _heat(axes: Axes, figure: Figure, grid: Series, keys: Sequence[Key]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    first = next(series for series in figure.series if series.z is not None)
    cells = [value for series in figure.series for row in series.z or () for value in row]
    shades = LinearSegmentedColormap.from_list("heat", [light for light, _ in palette.HEAT])
    numeric = all(isinstance(place, int | float) for place in (*grid.x, *grid.y))
    # A grid over the plane stands where its points do; a small one is a table of names.
    plane = numeric and is_data_space(figure)
    ends: Any = (grid.x[0], grid.x[-1], grid.y[0], grid.y[-1]) if plane else None
    image = axes.imshow(
        grid.z or [[]], origin="lower", extent=ends, cmap=shades, vmin=min(cells), vmax=max(cells), aspect="auto"
    )
    if not plane:
        # Every so many of the names, where there is no room for all.
        for ticks, places in ((axes.set_xticks, grid.x), (axes.set_yticks, grid.y)):
            some = range(0, len(places), 1 + len(places) // _MOST_NAMES)
            ticks(some, [_name(places[at]) for at in some])
    for series, key in zip(figure.series, keys, strict=True):
        if series.z is None:
            # Every panel has the points, the legend names them once.
            name = _text(series.name) if grid is first else ""
            axes.plot(series.x, _numbers(series.y), ".", color=_variable(key.colour), markersize=3, label=name or "_")
    if plane:
        axes.set_aspect("equal")
    axes.figure.colorbar(image, ax=axes, fraction=0.05)


def _text(name: str) -> str:
    # A dollar would begin a formula, and a name that begins with a line is left out of the legend.
    return name.replace("$", r"\$").lstrip("_")


def _name(place: float | str | None) -> str:
    return _text(place) if isinstance(place, str) else "" if place is None else number(place)


def _numbers(values: Sequence[float | str | None]) -> list[float]:
    return [float("nan") if not isinstance(value, int | float) else float(value) for value in values]


def _whiskers(series: Series) -> Any:
    if series.low is None or series.high is None:
        return None
    below = [
        0.0 if low is None or y is None else max(y - low, 0.0) for y, low in zip(series.y, series.low, strict=True)
    ]
    above = [
        0.0 if high is None or y is None else max(high - y, 0.0) for y, high in zip(series.y, series.high, strict=True)
    ]
    return [below, above]


def _of(name: str) -> str:
    return _STAND_INS[name]


def _variable(colour: str) -> str:
    return _STAND_INS[colour.removeprefix("var(--").removesuffix(")")]


def _tidied(text: str) -> str:
    """Fit for the inside of a page: no prologue, no ids that other pictures have too, no digits below a tenth."""
    text = text[text.index("<svg") :]
    # Its style would reach the whole page, which has the same rule for these pictures alone.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?:[a-zA-Z][\w.]*_\d+|image\w+)"', "", text)
    text = re.sub(r"#fe([0-9a-f]{4})", lambda found: f"var(--{_NAMES[int(found[1], 16)]})", text)
    # An attribute takes no variable, a style does.
    text = re.sub(r' (fill|stroke)="(var\([^"]*\))"', r' style="\1: \2"', text)
    # Of places only: a name like "rate 0.25" keeps its digits.
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\d+\.\d)\d+", r"\1", found[0]), text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    # What is no formula was kept from being one.
    text = text.replace(r"\$", "$")
    return re.sub(r">\s+<", "><", re.sub(r"\s*\n\s*", " ", text)).strip()
