"""The study as a whole: plan the runs, execute them side by side, keep the records, write the summary."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from batchnorm._errors import ConfigError
from batchnorm.study import events, records, sections
from batchnorm.study.config import OPT_IN, PRESETS, StudyConfig
from batchnorm.study.document import Summary
from batchnorm.study.folder import ENVIRONMENT, RunFolder
from batchnorm.study.plan import Run
from batchnorm.study.pool import Done, InProcess, Pool, Progress, Workers
from batchnorm.study.records import Record, Records
from batchnorm.study.summary import summarise

OnEvent = Callable[[events.Event], None]
# Before this share of the work is done, an estimate of the time left would only jump about.
_ENOUGH_TO_ESTIMATE = 0.03


def run_study(
    config: StudyConfig | None,
    out: str | Path,
    *,
    resume: bool = False,
    workers: int | None = None,
    download: bool = False,
    on_event: OnEvent | None = None,
    command: str = "",
) -> Summary:
    """Run a study into the folder ``out`` and return its document.

    Args:
        config: what to do; None takes the default, or with ``resume`` what the folder was started with.
        out: the folder; made if it is missing. It must be empty unless ``resume`` is true.
        resume: go on with a study that was interrupted; a folder without one is started.
        workers: processes side by side; default one per core. 1 runs in this process.
        download: fetch the data that a section in ``config.OPT_IN`` needs into ``config.data_dir``, where they are
            missing.
        on_event: called with each :class:`batchnorm.study.events.Event`, in this thread.
        command: the command line to show in the document.

    Raises:
        ConfigError: the configuration makes no sense, or differs from the one to be resumed.
        RecordsError: the folder holds something already, or damaged records.
        InputError: the data of a section in ``config.OPT_IN`` are missing, or are not what their format says.
        OutputError: the folder cannot be written.
        RunFailedError: a run failed. As with KeyboardInterrupt, finished runs are kept and ``resume`` goes on.
    """
    folder = RunFolder(Path(out))
    if workers is not None and workers < 1:
        raise ConfigError(f"expected at least 1 worker, got {workers}")
    on_event = on_event or _silent

    def tell(text: str) -> None:
        on_event(events.Noted(fraction=0.0, seconds_left=None, seconds=0.0, text=text))

    with folder.locked():
        going_on = resume and folder.started()
        if going_on:
            config, found = folder.resume(config)
        else:
            config = config or PRESETS["default"]
        # Before anything is begun: a file that is missing should not be found out after an hour.
        if wanted := [name for name in config.sections if name in OPT_IN]:
            from batchnorm.study import datasets

            datasets.prepare(wanted, config.data_dir, download, tell)
        if not going_on:
            found = folder.start(config)
        study = _Study(folder, config, list(found), on_event)
        study.go(workers or available_cores(), found if going_on else None)
        summary = summarise(folder.path, command=command)
        folder.write_summary(summary)
    return summary


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Study:
    """The state of one session: what is known, under way and done."""

    def __init__(self, folder: RunFolder, config: StudyConfig, lines: list[Record], on_event: OnEvent) -> None:
        self.folder = folder
        self.config = config
        self.lines = lines
        self.on_event = on_event
        self.began = time.monotonic()
        self.known: dict[str, Run] = {}
        self.later: dict[str, float] = {}
        self.queue: list[Run] = []
        self.partial: dict[str, float] = {}
        self.done: set[str] = {
            line["run"]
            for line in lines
            if line["metric"] == records.FINISHED and line["section"] != ENVIRONMENT.section
        }
        self.fraction = 0.0
        self.first_fraction = 0.0

    def go(self, workers: int, resumed: Records | None) -> None:
        for name in self.config.sections:
            self._plan(name)
        self.first_fraction = self._advance()
        left = sum(run.cost for run in self.queue) + sum(self.later.values())
        self._emit(events.StudyStarted, runs=len(self.known), workers=workers, expected=left / workers)
        if resumed is not None:
            self._emit(events.StudyResumed, finished=len(self.done), dropped=resumed.dropped)
        if self.queue:
            pool: Pool = InProcess(sections.execute) if workers == 1 else Workers(workers, sections.execute)
            try:
                self._work(pool)
            finally:
                pool.close()
                self._note_seconds()
        self._put_in_order()
        self.fraction = 1.0
        self._emit(events.StudyFinished, runs=len(self.known))

    def _work(self, pool: Pool) -> None:
        under_way = 0
        while self.queue or under_way:
            while self.queue and pool.idle():
                run = self.queue.pop(0)
                pool.submit(run)
                under_way += 1
                self._emit(events.RunStarted, **_names(run))
            for done in pool.wait(self._progress):
                under_way -= 1
                self._keep(done)

    def _plan(self, name: str) -> None:
        """Ask a section which runs it needs; called again when all its known runs are done."""
        plan = sections.plan(name, self.config, Records(tuple(self.lines)))
        self.later[name] = plan.later
        for run in plan.runs:
            if run.id not in self.known:
                self.known[run.id] = run
                if run.id not in self.done:
                    self.queue.append(run)
        # Follow-up runs go first: the longer the way, the earlier it has to begin.
        order = {name: place for place, name in enumerate(self.config.sections)}
        self.queue.sort(key=lambda run: (order[run.section], -run.cost))

    def _keep(self, done: Done) -> None:
        records.append(self.folder.records_file, done.block)
        self.lines += done.block
        self.done.add(done.run.id)
        self.partial.pop(done.run.id, None)
        section = done.run.section
        if all(run.id in self.done for run in self.known.values() if run.section == section):
            self._plan(section)
        self._advance()
        accuracies = [line["value"] for line in done.block if line["metric"] == "accuracy"]
        self._emit(
            events.RunFinished,
            **_names(done.run),
            step=done.block[-1]["step"],
            accuracy=accuracies[-1] if accuracies else None,
            finished_runs=len(self.done),
            known_runs=len(self.known),
        )

    def _progress(self, progress: Progress) -> None:
        run = progress.run
        self.partial[run.id] = run.cost * progress.step / max(run.steps, 1)
        self._advance()
        self._emit(events.RunProgress, **_names(run), step=progress.step, accuracy=progress.accuracy)

    def _advance(self) -> float:
        total = sum(run.cost for run in self.known.values()) + sum(self.later.values())
        done = sum(run.cost for run in self.known.values() if run.id in self.done) + sum(self.partial.values())
        self.fraction = max(self.fraction, min(done / total, 1.0) if total else 1.0)
        return self.fraction

    def _emit(self, kind: type[events.Event], **more: object) -> None:
        seconds = time.monotonic() - self.began
        gained = self.fraction - self.first_fraction
        left = seconds * (1 - self.fraction) / gained if gained > _ENOUGH_TO_ESTIMATE else None
        self.on_event(kind(fraction=self.fraction, seconds_left=left, seconds=seconds, **more))

    def _note_seconds(self) -> None:
        """Record how long this session took, so that a summary can tell the whole time of an interrupted study."""
        run = Run(f"{ENVIRONMENT.id}/session", "environment", "environment", self.config.seed, 0, 0.0)
        block = [run.record(0, "seconds", round(time.monotonic() - self.began, 3), what="session"), run.finished(0)]
        with contextlib.suppress(OSError):  # an error that is already on its way must not be hidden by this one
            records.append(self.folder.records_file, block)
            self.lines += block

    def _put_in_order(self) -> None:
        """Write the finished records in the plan's order, which does not depend on which worker was the faster."""
        by_section = sorted(self.known.values(), key=lambda run: self.config.sections.index(run.section))
        order = {run_id: place for place, run_id in enumerate([ENVIRONMENT.id, *(run.id for run in by_section)])}
        inner = [line for line in self.lines if line["run"] in order]
        session = [line for line in self.lines if line["run"] not in order and line["metric"] == "seconds"]
        inner.sort(key=lambda line: order[line["run"]])
        if session:
            whole = session[0] | {"value": round(sum(line["value"] for line in session), 3)}
            inner += [whole, whole | {"metric": records.FINISHED, "value": True}]
        records.rewrite(self.folder.records_file, inner)


def _silent(_: events.Event) -> None:
    pass


def _names(run: Run) -> dict[str, object]:
    return {"run": run.id, "section": run.section, "variant": run.variant, "seed": run.seed, "steps": run.steps}
