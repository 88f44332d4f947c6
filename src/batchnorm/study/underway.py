"""Runs under way in a folder: hand them to a pool, keep what they report, tell how far everything is."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterable

from batchnorm.study import events, records
from batchnorm.study.folder import ENVIRONMENT, RunFolder
from batchnorm.study.plan import Run
from batchnorm.study.pool import Done, Pool, Progress
from batchnorm.study.records import Record

OnEvent = Callable[[events.Event], None]
SESSION = f"{ENVIRONMENT.id}/session"
"""The run that records how long each session took."""

# Before this share of the work is done, an estimate of the time left would only jump about.
_ENOUGH_TO_ESTIMATE = 0.03


class UnderWay(abc.ABC):
    """The state of one session: what is known, waiting and done. Subclasses plan.

    ``metric`` is what a finished run is told by, its last value.
    """

    metric = "accuracy"

    def __init__(self, folder: RunFolder, seed: int, lines: Iterable[Record], on_event: OnEvent | None) -> None:
        self.folder, self.seed = folder, seed
        self.lines = list(lines)
        self.on_event = on_event or _silent
        self.began = time.monotonic()
        self.known: dict[str, Run] = {}
        self.queue: list[Run] = []
        self.partial: dict[str, float] = {}
        self.done = {line["run"] for line in self.lines if line["metric"] == records.FINISHED}
        self.fraction = self.first_fraction = 0.0

    @abc.abstractmethod
    def follow_up(self, run: Run) -> None:
        """Plan what there is to do now that ``run`` is done: :meth:`add` it and sort the queue."""

    @abc.abstractmethod
    def later(self) -> float:
        """The cost of runs that are expected and not known yet."""

    def start_of(self, run: Run) -> int:  # noqa: ARG002 - for subclasses
        """The step that a run begins at."""
        return 0

    def add(self, runs: Iterable[Run]) -> None:
        """Take in runs; those that are neither known nor done are queued."""
        for run in runs:
            if run.id not in self.known:
                self.known[run.id] = run
                if run.id not in self.done:
                    self.queue.append(run)

    def started(self, workers: int) -> None:
        """Tell that work begins, and how long it should take."""
        self.first_fraction = self.advance()
        left = sum(run.cost for run in self.queue) + self.later()
        self.emit(events.StudyStarted, runs=len(self.known), workers=workers, expected=left / workers)

    def work(self, pool: Pool) -> None:
        """Run whatever is queued, and what follows from it."""
        under_way = 0
        while self.queue or under_way:
            while self.queue and pool.idle():
                run = self.queue.pop(0)
                pool.submit(run)
                under_way += 1
                self.emit(events.RunStarted, **_names(run))
            for done in pool.wait(self._progress):
                under_way -= 1
                self._finished(done)

    def keep(self, block: list[Record]) -> None:
        """Write the records of a run that is done."""
        records.append(self.folder.records_file, block)
        self.lines += block
        self.done.add(block[-1]["run"])

    def finished(self) -> int:
        """How many of the known runs are done."""
        return len(self.done & self.known.keys())

    def advance(self) -> float:
        """The share of the work that is done. It never falls, though new runs may become known."""
        total = sum(run.cost for run in self.known.values()) + self.later()
        done = sum(run.cost for run in self.known.values() if run.id in self.done) + sum(self.partial.values())
        self.fraction = max(self.fraction, min(done / total, 1.0) if total else 1.0)
        return self.fraction

    def emit(self, kind: Callable[..., events.Event], **more: object) -> None:
        """Tell an event, with how far everything is."""
        seconds = time.monotonic() - self.began
        gained = self.fraction - self.first_fraction
        left = seconds * (1 - self.fraction) / gained if gained > _ENOUGH_TO_ESTIMATE else None
        self.on_event(kind(fraction=self.fraction, seconds_left=left, seconds=seconds, **more))

    def note_seconds(self) -> None:
        """Record how long this session took, so that a summary can tell the whole time of an interrupted study."""
        run = Run(SESSION, "environment", "environment", self.seed, 0, 0.0)
        block = [run.record(0, "seconds", round(time.monotonic() - self.began, 3), what="session"), run.finished(0)]
        with contextlib.suppress(OSError):  # an error that is already on its way must not be hidden by this one
            records.append(self.folder.records_file, block)
            self.lines += block

    def put_in_order(self, runs: Iterable[str]) -> None:
        """Write the finished records in the order of ``runs``, which does not depend on which worker was the faster."""
        order = {name: place for place, name in enumerate([ENVIRONMENT.id, *runs])}
        inner = sorted((line for line in self.lines if line["run"] in order), key=lambda line: order[line["run"]])
        sessions = [line for line in self.lines if line["run"] == SESSION and line["metric"] == "seconds"]
        if sessions:
            whole = sessions[0] | {"value": round(sum(line["value"] for line in sessions), 3)}
            inner += [whole, whole | {"metric": records.FINISHED, "value": True}]
        self.lines = inner
        records.rewrite(self.folder.records_file, inner)
        self.fraction = 1.0
        self.emit(events.StudyFinished, runs=len(self.known))

    def _progress(self, progress: Progress) -> None:
        run, start = progress.run, self.start_of(progress.run)
        self.partial[run.id] = run.cost * max(progress.step - start, 0) / max(run.steps - start, 1)
        self.advance()
        self.emit(events.RunProgress, **_names(run), step=progress.step, accuracy=progress.accuracy)

    def _finished(self, done: Done) -> None:
        self.keep(done.block)
        self.partial.pop(done.run.id, None)
        self.follow_up(done.run)
        self.advance()
        values = [line["value"] for line in done.block if line["metric"] == self.metric]
        self.emit(
            events.RunFinished,
            **_names(done.run),
            step=done.block[-1]["step"],
            accuracy=values[-1] if values else None,
            finished_runs=self.finished(),
            known_runs=len(self.known),
        )


def _silent(_: events.Event) -> None:
    pass


def _names(run: Run) -> dict[str, object]:
    return {"run": run.id, "section": run.section, "variant": run.variant, "seed": run.seed, "steps": run.steps}
