"""A watch in the terminal: a table of its layers, the worst first, drawn anew at each look."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from batchnorm._errors import InputError
from batchnorm.report.looks import Look, look_of, percent
from batchnorm.report.numbers import NOTHING

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_CUT = "\u2026"
_HISTORY = 24
# Lines besides those of layers: title, head, rule, two empty ones, how many more there are, and the prompt's.
_AROUND = 7
# Characters that a column takes, in the order in which they are left out, the last first. A name gets what is left.
_WIDTHS = {"gap": 7, "var ratio": 11, "dead": 6, "gradient": 8, "saturated": 9, "median": _HISTORY}
_NAME = 14
# What stands between two columns, and at both edges together.
_GAP, _EDGES = 3, 2


class Watched(Protocol):
    """What is needed of a watch."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the watched layers."""

    def latest(self, layer: str) -> dict[str, Any]:
        """The last record of a layer; InputError where there is none."""


class LiveView:
    """Shows a watch in the terminal while it runs; give it to the watch as ``on_look``.

    >>> with bn.report.LiveView() as view, bn.watch(model, on_look=view) as watch:    # doctest: +SKIP
    ...     train(model)

    A line for each layer: the largest ``|mean gap|`` in running deviations, the range of the variance ratio, dead
    units, saturated values, the norm of the gradient, and the median of the typical unit's input over the last looks.
    The worst layers stand first (see :attr:`~batchnorm.report.looks.Look.severity`), as many as fit on the screen;
    narrow terminals get fewer columns. What the training prints appears above the table. Where the output is no
    terminal, nothing is shown while it runs.

    Args:
        console: where to draw; by default standard output. A view is also something that rich can print: put it into a
            ``Live`` or a ``Layout`` of your own and leave the ``with`` out.
        final: at the end, print the table of all layers, terminal or not. Otherwise a terminal keeps the last drawing.
    """

    def __init__(self, console: Console | None = None, *, final: bool = False) -> None:
        self.console = Console(highlight=False) if console is None else console
        self.final = final
        self._latest: dict[str, Look] = {}
        self._medians: dict[str, deque[float]] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # Drawn at each look and not by the clock: no thread runs beside the training.
            self._live = Live(self._screen(), console=self.console, auto_refresh=False, transient=self.final)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        if self.final and self._latest:
            self.console.print(self.table(width=self.console.width))

    def __call__(self, watch: Watched) -> None:
        """Take in the latest look of ``watch``, and draw."""
        for name in watch.layers:
            try:
                look = look_of(watch.latest(name))
            except InputError:  # not looked at yet
                continue
            if self._latest.get(name) != look:
                self._latest[name] = look
                if look.typical is not None:
                    self._medians.setdefault(name, deque(maxlen=_HISTORY)).append(look.typical[1])
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)

    def __rich__(self) -> RenderableType:
        return self._screen()

    def _screen(self) -> RenderableType:
        return self.table(max(1, self.console.height - _AROUND), self.console.width)

    def table(self, rows: int | None = None, width: int | None = None) -> RenderableType:
        """The layers as they are now, the worst first.

        Args:
            rows: show no more layers than this; None for all.
            width: leave out what has no room in so many characters; None for none.
        """
        if not self._latest:
            return Text("waiting for the first look", "dim")
        order = sorted(self._latest, key=lambda name: -self._latest[name].severity)
        shown = order if rows is None or len(order) <= rows else order[: max(1, rows)]
        step = max(look.step for look in self._latest.values())
        count = f"{len(order)} layers, the worst first" if len(order) > 1 else "1 layer"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        columns, room = self._columns(width)
        table.add_column("layer", no_wrap=True)
        for name in columns:
            left = name == "median"
            table.add_column(name, no_wrap=True, min_width=_WIDTHS[name], justify="left" if left else "right")
        names = _fitting(order, room)
        for name in shown:
            look = self._latest[name]
            cells = self._cells(name, look)
            late = "dim" if look.step < step else ""
            table.add_row(Text(names[name], late), *(cells[column] for column in columns))
        head = Text.assemble((f"step {step:,}", "bold"), f"   {count}", no_wrap=True, overflow="ellipsis")
        more = [Text(f"and {len(order) - len(shown)} more", "dim")] if len(shown) < len(order) else []
        return Group(head, table, *more)

    def _columns(self, width: int | None) -> tuple[list[str], int]:
        """What there is something for, and room; and how much room is left for a name."""
        looks = self._latest.values()
        saturates = any(look.saturated is not None for look in looks)
        columns = [name for name in _WIDTHS if saturates or name != "saturated"]
        names = max(len(name) for name in self._latest)
        if width is None:
            return columns, names
        while columns and _left(columns, width) < min(_NAME, names):
            columns.pop()
        return columns, max(_left(columns, width), 8)

    def _cells(self, name: str, look: Look) -> dict[str, Text]:
        ratio = NOTHING
        if look.ratio is not None:
            low, high = look.ratio
            ratio = f"{_brief(low)}\u2013{_brief(high)}"
        return {
            "gap": Text(NOTHING if look.gap is None else _brief(look.gap), _style(look.gap)),
            "var ratio": Text(ratio, _style(look.spread)),
            "dead": Text(NOTHING if look.dead is None else percent(look.dead), _style(look.dead)),
            "saturated": Text(NOTHING if look.saturated is None else percent(look.saturated), _style(look.saturated)),
            "gradient": Text(NOTHING if look.gradient is None else _brief(look.gradient)),
            "median": Text("NaN or inf", "bold red")
            if not look.finite
            else Text(sparkline(self._medians.get(name, ()))),
        }


def sparkline(values: Any) -> str:
    """A bar for each value between the least and the largest; all alike is a line in the middle."""
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return _BARS[3] * len(values)
    return "".join(_BARS[min(int((value - low) / (high - low) * len(_BARS)), len(_BARS) - 1)] for value in values)


def _left(columns: Sequence[str], width: int) -> int:
    return width - _EDGES - sum(_WIDTHS[name] + _GAP for name in columns)


def _fitting(names: Sequence[str], room: int) -> dict[str, str]:
    """Names that fit: without what all have in common at both ends, and then without their middle."""
    if all(len(name) <= room for name in names):
        return {name: name or "the model" for name in names}
    paths = {name: name.split(".") for name in names}
    shortest = min(map(len, paths.values())) - 1
    head = next((at for at in range(shortest) if len({path[at] for path in paths.values()}) > 1), shortest)
    tail = next((at for at in range(shortest - head) if len({path[-1 - at] for path in paths.values()}) > 1), None)
    tail = shortest - head if tail is None else tail
    found = {}
    for name, path in paths.items():
        core = ".".join(path[head : len(path) - tail]) or "the model"
        core = _CUT * bool(head) + core + _CUT * bool(tail)
        end = (room - 1) // 2
        found[name] = core if len(core) <= room else core[: room - 1 - end] + _CUT + core[-end:]
    return found


def _brief(value: float) -> str:
    return f"{value:.2g}"


def _style(value: float | None) -> str:
    """Yellow from half of what is much on, red from there."""
    if value is None or value < 0.5:
        return ""
    return "yellow" if value < 1.0 else "bold red"
