"""The study's summary for a terminal, or for a file that stands in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.report.headline import headline
from batchnorm.report.numbers import column
from batchnorm.study.document import Summary

_PLAIN_WIDTH = 100


def console_for(stream: TextIO) -> Console:
    """A console that writes control characters only where a terminal reads them, whatever the environment says."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, force_terminal=False, color_system=None, width=_PLAIN_WIDTH)


def simple_table(columns: Sequence[str], numeric: Sequence[str] = ()) -> Table:
    """An empty table in the one style of all commands; columns named in ``numeric`` are set flush right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(Text(name), overflow="fold", justify="right" if name in numeric else "left")
    return table


def render(summary: Summary) -> RenderableType:
    """The headline with its spread and its limits, and the overview table. Strings are shown as they are, no markup."""
    parts: list[RenderableType] = []
    top = headline(summary)
    if not summary.complete:
        parts.append(Text("This study is not finished: these are the numbers so far.", "yellow"))
    if top is not None:
        without, with_bn = top.arms
        if top.ratio is None:
            parts.append(Text(f"No ratio: {top.threshold} test accuracy was not reached by both.", "bold"))
        else:
            claim = f"{top.ratio} times fewer steps to {top.threshold} test accuracy with batch norm"
            parts.append(Text.assemble((claim, "bold"), f"  ({top.spread} over {top.seeds})"))
        arms = [f"{arm.label}: {arm.steps} ({arm.spread})" for arm in (without, with_bn)]
        parts.append(Text("   ".join(arms)))
        if top.limits:
            parts.append(Text("What this does not say:", "bold"))
            parts += [Text(f"- {line}") for line in top.limits]
        parts.append(Text())
    overview = summary.overview
    table = simple_table(overview.columns)
    table.show_lines = True
    texts = [column(cells) for cells in zip(*overview.rows, strict=True)] if overview.rows else []
    for row in zip(*texts, strict=True):
        table.add_row(*(Text(cell) for cell in row))
    if overview.rows:
        parts.append(table)
    return Group(*parts)
