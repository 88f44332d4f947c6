"""What is seen of a running study: a live view in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchnorm.report.numbers import duration
from batchnorm.report.terminal import console_for
from batchnorm.study import events

# A plain log of a study is some twenty lines, however many runs it has.
_PLAIN_SHARE = 0.05
_PLAIN_SECONDS = 2.0
_PLAIN_SILENCE = 20.0


def watcher(stream: TextIO, folder: Path, what: str = "study", measure: str = "accuracy") -> Watcher:
    """The watcher that fits ``stream``; ``what`` runs, and ``measure`` is the value that its runs report."""
    console = console_for(stream)
    found = Screen(console, folder) if stream.isatty() and not console.is_dumb_terminal else Watcher(stream, folder)
    found.what, found.measure = what, measure
    return found


class Watcher:
    """Plain lines: what began, now and then what is finished and how much is left, what came out. Flushed."""

    what = "study"
    measure = "accuracy"

    def __init__(self, stream: TextIO, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        self.finished = 0
        self._last_share = 0.0
        self._last_time = time.monotonic()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def on_event(self, event: events.Event) -> None:
        """Take note of ``event``, and say so where it is worth a line."""
        if isinstance(event, events.StudyResumed):
            self.finished = event.finished
            dropped = f" ({event.dropped})" if event.dropped else ""
            self._line(f"going on: {event.finished} runs were finished before{dropped}")
        elif isinstance(event, events.StudyStarted):
            many = f"{event.runs} runs or more, {event.workers} side by side"
            self._line(f"{self.what} in {self.folder}: {many}{expected(event)}")
        elif isinstance(event, events.Noted):
            self._line(f"note: {event.text}")
        elif isinstance(event, events.StudyFinished):
            self._line(f"100%  all {event.runs} runs finished in {duration(event.seconds)}")
        elif isinstance(event, events.RunFinished):
            self.finished = event.finished_runs
            self._finished(event)

    def _finished(self, event: events.RunFinished) -> None:
        now = time.monotonic()
        waited = now - self._last_time
        if waited < _PLAIN_SECONDS or (event.fraction - self._last_share < _PLAIN_SHARE and waited < _PLAIN_SILENCE):
            return
        self._last_share, self._last_time = event.fraction, now
        reached = "" if event.accuracy is None else f"{self.measure} {event.accuracy:.3f} "
        self._line(
            f"{event.fraction:4.0%}  {event.finished_runs} of {event.known_runs} runs, "
            f"{event.run}: {reached}after {event.step} steps, {time_left(event)}"
        )

    def _line(self, text: str) -> None:
        # Not through rich, which would wrap: a line of a log is a line.
        print(text, file=self.stream, flush=True)


class Screen(Watcher):
    """A view that is drawn anew some times a second: the whole, each section, and each run under way."""

    def __init__(self, console: Console, folder: Path) -> None:
        super().__init__(console.file, folder)  # type: ignore[arg-type]
        self.console = console
        self.latest = events.Event(0.0, None, 0.0)
        self.latest_at = time.monotonic()
        self.runs = 0
        self.workers = 1
        self.under_way: dict[str, events.RunStarted | events.RunProgress] = {}
        self.sections: dict[str, int] = {}
        self.live = Live(get_renderable=self.view, console=console, refresh_per_second=6, transient=True)

    def __enter__(self) -> Screen:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def on_event(self, event: events.Event) -> None:
        """Take note of ``event``; the next drawing shows it."""
        self.latest, self.latest_at = event, time.monotonic()
        if isinstance(event, events.StudyStarted):
            self.runs, self.workers = event.runs, event.workers
            what = f"{self.what.capitalize()} in "
            self.console.print(Text.assemble(what, (str(self.folder), "bold"), expected(event)), soft_wrap=True)
        elif isinstance(event, events.StudyResumed | events.Noted):
            super().on_event(event)
        elif isinstance(event, events.RunStarted | events.RunProgress):
            self.under_way[event.run] = event
        elif isinstance(event, events.RunFinished):
            self.under_way.pop(event.run, None)
            self.finished, self.runs = event.finished_runs, event.known_runs
            self.sections[event.section] = self.sections.get(event.section, 0) + 1
        elif isinstance(event, events.StudyFinished):
            self.console.print(Text(f"{event.runs} runs in {duration(event.seconds)}", "green"))

    def _line(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def view(self) -> RenderableType:
        """The screen as it is now."""
        # Between two events the clock goes on, and the time left goes down with it.
        since = time.monotonic() - self.latest_at
        left = self.latest.seconds_left
        now = events.Event(
            self.latest.fraction, None if left is None else max(left - since, 0.0), self.latest.seconds + since
        )
        bar = ProgressBar(total=1.0, completed=now.fraction, width=None)
        whole = Table.grid(padding=(0, 2), expand=True)
        whole.add_column(ratio=1)
        for _ in range(4):
            whole.add_column(no_wrap=True, justify="right")
        whole.add_row(
            bar,
            f"{now.fraction:.0%}",
            f"{self.finished}/{self.runs} runs",
            duration(now.seconds) if now.seconds >= 10 else f"{now.seconds:.0f} s",
            Text(time_left(now), "cyan"),
        )
        runs = Table.grid(padding=(0, 2))
        for justify in ("left", "right", "right"):
            runs.add_column(no_wrap=True, overflow="ellipsis", justify=justify)
        for event in self.under_way.values():
            step = event.step if isinstance(event, events.RunProgress) else 0
            accuracy = event.accuracy if isinstance(event, events.RunProgress) else None
            runs.add_row(
                Text(event.run),
                Text(f"step {step}/{event.steps}", "dim"),
                Text("" if accuracy is None else f"{self.measure} {accuracy:.3f}", "bold"),
            )
        return Group(whole, runs)


def expected(event: events.StudyStarted) -> str:
    """``, roughly 25 min 00 s``, where it takes so long that one would rather know before; else empty."""
    return f", roughly {duration(60 * round(event.expected / 60))}" if event.expected >= 90 else ""


def time_left(event: events.Event) -> str:
    """``about 50 s left``, in steps that do not flicker."""
    if event.seconds_left is None:
        return "estimating the time left"
    left = event.seconds_left
    told = f"{max(5 * round(left / 5), 5)} s" if left < 57 else duration(10 * round(left / 10))
    return f"about {told} left"
