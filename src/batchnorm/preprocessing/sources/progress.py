"""How far the reading is: a bar on a terminal, or a function of the caller's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchnorm.preprocessing.sources.source import Progress, Source


@contextmanager
def reporting(source: Source) -> Iterator[Progress | None]:
    """What is to be told of each part that was worked on: the caller's function, a bar, or nobody."""
    if source.progress is not True:
        yield source.progress or None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with _bar(source, console) as report:
        yield report


@contextmanager
def _bar(source: Source, console: object) -> Iterator[Progress]:
    """Rows, their rate and the time left; the share of the bytes where nobody knows how many rows there are."""
    from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    total = source.rows if source.rows is not None else source.size
    with Bar(*columns, console=console, transient=True) as bar:  # type: ignore[arg-type]
        task = bar.add_task(source.label, total=total, rows="")

        def report(done: int, rows: int | None) -> None:
            seconds = max(bar.tasks[0].elapsed or 0.0, 1e-3)
            of = "" if rows is None else f" of {rows:,}"
            text = f"{done:,}{of} rows, {done / seconds:,.0f}/s"
            bar.update(task, completed=source.read_bytes if rows is None else done, rows=text)

        yield report
