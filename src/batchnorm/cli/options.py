"""Options that several commands share, and what they say while data stream by."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]
Progress = Callable[[int, "int | None"], None]

_FILE = click.Path(path_type=Path)


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names parted by commas."""
    if value is None:
        return None
    found = tuple(name.strip() for name in value.split(",") if name.strip())
    if not found:
        raise click.BadParameter("expected names parted by commas", ctx, param)
    return found


columns = click.option(
    "--columns", metavar="A,B,...", callback=names, help="Which columns are the features; the array of an .npz file."
)
batch_rows = click.option(
    "--batch-rows", type=click.IntRange(min=1), metavar="N", help="Rows read at a time.  [default: some megabytes]"
)
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of a table.")
force = click.option("--force", is_flag=True, help="Replace what is there.")


def statistics_out(required: bool = True) -> Callable[[Command], Command]:
    """``--out``, a file for statistics."""

    def check(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".safetensors":
            raise click.BadParameter(f"expected a name that ends in .safetensors, got {str(value)!r}", ctx, param)
        return value

    return click.option(
        "--out", type=_FILE, metavar="FILE", required=required, callback=check, help="Where the statistics go."
    )


def refuse_existing(path: Path, force: bool) -> None:
    """Say before the work, not after it, that the result has no place. Raises OutputError."""
    from batchnorm._errors import OutputError

    if path.is_dir():
        raise OutputError(f"expected a file, got the folder {path}: name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}, create it first")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already: name another file, or replace it with --force")


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """The library's warnings as lines on stderr, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", RuntimeWarning)
        yield
    for text in dict.fromkeys(" ".join(str(item.message).split()) for item in caught):
        click.echo(f"batchnorm: warning: {text}", err=True)


def quiet_ray() -> None:
    """Keep Ray's own log out of ours; on a terminal its progress stays."""
    import logging

    from batchnorm.preprocessing.distributed.ray_data import need_ray

    data = need_ray()
    data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Meter:
    """Counts rows, and shows them on a terminal: a bar, their rate and the time left. In a log it says nothing.

    ``bytes_read``: the share that is done, where nobody knows how many rows there are. ``unit``: what is counted.
    """

    def __init__(
        self, label: str, bytes_read: Callable[[], tuple[int, int] | None] | None = None, unit: str = "rows"
    ) -> None:
        self.label = label
        self.unit = unit
        self.rows = 0
        self.bytes_read = bytes_read
        self._bar: Any = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            console = Console(stderr=True, highlight=False)
            if not console.is_dumb_terminal:
                self._bar = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    TextColumn("{task.fields[rows]}", markup=False),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=console,
                    transient=True,
                )
                self._task = self._bar.add_task(self.label, total=None, rows="")
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, rows: int, total: int | None) -> None:
        self.rows = rows
        if self._bar is None:
            return
        now = self._bar.tasks[0].elapsed or 0.0
        # Rows of an earlier run that is gone on with took no time now.
        before, began = self._first = self._first or (rows, now)
        rate = f", {(rows - before) / (now - began):,.0f}/s" if now - began > 0.5 else ""
        of = "" if total is None else f" of {total:,}"
        done, whole = (rows, total) if total is not None else ((self.bytes_read and self.bytes_read()) or (0, None))
        self._bar.update(self._task, completed=done, total=whole, rows=f"{rows:,}{of} {self.unit}{rate}")
