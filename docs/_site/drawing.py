"""Plots for the tutorial, by matplotlib: points and lines on one or several panels, as small SVG files.

The same numbers give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = ("#3949ab", "#e65100", "#00796b", "#8e24aa", "#616161")  # 3:1 on white at least
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "batchnorm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#bbb",
    "axes.grid": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "xtick.color": "#444",
    "ytick.color": "#444",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}
Range = tuple[float, float]


class Panel:
    """One plot. ``equal``: a unit is as long on both axes; ``log``: the y axis is logarithmic."""

    def __init__(self, title: str, x: str = "", y: str = "", *, equal: bool = False, log: bool = False) -> None:
        self.title, self.x, self.y, self.equal, self.log = title, x, y, equal, log
        self.marks: list[tuple[str, list[float], list[float], int, str]] = []
        self.given: tuple[Range | None, Range | None] = (None, None)

    def points(self, x: Iterable[float], y: Iterable[float], label: str = "", colour: int | None = None) -> Self:
        """A dot for each pair."""
        return self._add("points", x, y, label, colour)

    def line(self, x: Iterable[float], y: Iterable[float], label: str = "", colour: int | None = None) -> Self:
        """A line through the pairs."""
        return self._add("line", x, y, label, colour)

    def within(self, x: Range | None = None, y: Range | None = None) -> Self:
        """These ends of the axes, instead of those of the data."""
        self.given = (x, y)
        return self

    def _add(self, kind: str, x: Iterable[float], y: Iterable[float], label: str, colour: int | None) -> Self:
        place = len(self.marks) if colour is None else colour
        self.marks.append((kind, [float(v) for v in x], [float(v) for v in y], place, label))
        return self

    def draw(self, axes: Any) -> None:
        """Draw the panel on matplotlib's ``axes``."""
        axes.set(title=self.title, xlabel=self.x, ylabel=self.y, axisbelow=True)
        for kind, xs, ys, colour, label in self.marks:
            few = len(xs) < 10
            dots = {"linestyle": "", "marker": ".", "ms": 10 if few else 4, "alpha": 1 if few else 0.55}
            look = {"linewidth": 1.5} if kind == "line" else dots
            axes.plot(xs, ys, color=COLOURS[colour % len(COLOURS)], label=label or "_", **look)
        if self.log:
            axes.set_yscale("log")
        if self.equal:
            axes.set_aspect("equal", adjustable="datalim")
        axes.set(**{f"{name}lim": ends for name, ends in zip("xy", self.given, strict=True) if ends})
        if any(label for *_, label in self.marks):
            axes.legend(fontsize=8)


def save(path: Path, *panels: Panel) -> None:
    """Write the panels side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.0), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel.draw(axes)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    text = path.read_text(encoding="utf-8")
    # Small files: a tenth of a point is finer than a screen, and each dot repeats what the one that it uses has.
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda at: re.sub(r"(\d+\.\d)\d+", r"\1", at[0]), text[text.index("<svg") :])
    text = re.sub(r'(<use [^>]*?) style="fill: (#\w+)[^"]*"', r'\1 fill="\2"', text)
    text = re.sub(r"\n\s*(?=<use)", "", text)
    path.write_text(text, encoding="utf-8")
