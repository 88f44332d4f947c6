"""Small plots as SVG, for the tutorial: points, lines and a legend on one or several panels, and nothing else.

The same numbers give the same bytes, and a plot takes a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Self
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 300, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 44, 42
COLOURS = ("#3949ab", "#e65100", "#00796b", "#8e24aa", "#616161")  # 3:1 on white at least
Range = tuple[float, float]


class Panel:
    """One plot. ``equal``: a unit is as long on both axes; ``log``: the y axis is logarithmic."""

    def __init__(self, title: str, x: str = "", y: str = "", *, equal: bool = False, log: bool = False) -> None:
        self.title, self.x, self.y, self.equal, self.log = title, x, y, equal, log
        self.marks: list[tuple[str, list[float], list[float], int, str]] = []
        self.colour = 0
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
        if colour is None:
            colour, self.colour = self.colour, self.colour + 1
        self.marks.append((kind, [float(v) for v in x], [float(v) for v in y], colour, label))
        return self

    def _ranges(self) -> tuple[Range, Range]:
        xs = [v for mark in self.marks for v in mark[1]]
        ys = [self._height(v) for mark in self.marks for v in mark[2]]
        (x0, x1), (y0, y1) = (_wider(min(v), max(v)) for v in (xs, ys))
        if self.given[0]:
            x0, x1 = self.given[0]
        if self.given[1]:
            y0, y1 = (self._height(v) for v in self.given[1])
        if self.equal:
            unit = max((x1 - x0) / (WIDTH - LEFT - RIGHT), (y1 - y0) / (HEIGHT - TOP - BOTTOM))
            for_x, for_y = unit * (WIDTH - LEFT - RIGHT) / 2, unit * (HEIGHT - TOP - BOTTOM) / 2
            mid_x, mid_y = (x0 + x1) / 2, (y0 + y1) / 2
            return (mid_x - for_x, mid_x + for_x), (mid_y - for_y, mid_y + for_y)
        return (x0, x1), (y0, y1)

    def _height(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def draw(self, left: float) -> list[str]:
        """The panel's elements, ``left`` from the figure's left edge."""
        (x0, x1), (y0, y1) = self._ranges()
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

        def place(x: float, y: float) -> str:
            across = LEFT + (x - x0) / (x1 - x0) * (right - LEFT)
            up = bottom - (self._height(y) - y0) / (y1 - y0) * (bottom - TOP)
            return f"{across:.1f},{min(max(up, TOP), bottom):.1f}"

        out = [
            f'<g transform="translate({left:g} 0)">',
            f'<text x="{LEFT}" y="18" class="t">{escape(self.title)}</text>',
        ]
        for value in _ticks(x0, x1):
            at = place(value, 10**y0 if self.log else y0).split(",")[0]
            out.append(
                f'<path class="g" d="M{at} {TOP}V{bottom}"/><text x="{at}" y="{bottom + 15}" class="m">{value:g}</text>'
            )
        for value in _ticks(y0, y1, whole=self.log):
            real = 10**value if self.log else value
            at = float(place(x0, real).split(",")[1])
            out.append(
                f'<path class="g" d="M{LEFT} {at}H{right}"/><text x="{LEFT - 5}" y="{at + 4}" class="e">{real:g}</text>'
            )
        for kind, xs, ys, colour, _ in self.marks:
            ink = COLOURS[colour % len(COLOURS)]
            spots = [place(x, y) for x, y in zip(xs, ys, strict=True)]
            if kind == "line":
                out.append(f'<polyline stroke="{ink}" points="{" ".join(spots)}"/>')
            else:
                path = "".join(f"M{spot}h0" for spot in spots)
                out.append(f'<path class="p" stroke="{ink}" d="{path}"/>')
        labels = [mark for mark in self.marks if mark[4]]
        if labels:
            spans = (
                f'<tspan fill="{COLOURS[colour % len(COLOURS)]}">{escape(label)}</tspan>'
                for _, _, _, colour, label in labels
            )
            out.append(f'<text x="{LEFT}" y="35">{"  ·  ".join(spans)}</text>')
        out.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" class="m">{escape(self.x)}</text>')
        middle = (TOP + bottom) / 2
        out.append(f'<text transform="translate(12 {middle}) rotate(-90)" class="m">{escape(self.y)}</text></g>')
        return out


def save(path: Path, *panels: Panel) -> None:
    """Write the panels side by side."""
    width = WIDTH * len(panels)
    style = (
        "text{font:12px sans-serif;fill:#333}.t{font-weight:bold}.m{text-anchor:middle}.e{text-anchor:end}"
        ".g{stroke:#e4e4e4}polyline{fill:none;stroke-width:1.8}"
        ".p{stroke-width:3.5;stroke-linecap:round;stroke-opacity:.55}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">',
        f"<style>{style}</style>",
        f'<rect width="{width}" height="{HEIGHT}" rx="6" fill="#fff"/>',
        *(line for number, panel in enumerate(panels) for line in panel.draw(WIDTH * number)),
        "</svg>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _wider(low: float, high: float) -> Range:
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Three to seven round numbers between ``low`` and ``high``."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step = next((step * f for f in (5, 2, 1) if (high - low) / (step * f) >= 3), step)
    if whole:
        step = max(1, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]
