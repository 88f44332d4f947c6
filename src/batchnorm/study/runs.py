"""The study as a whole: plan the runs, execute them side by side, keep the records, write the summary."""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm._errors import ConfigError
from batchnorm.study import events, sections
from batchnorm.study.config import OPT_IN, PRESETS, StudyConfig
from batchnorm.study.document import Summary
from batchnorm.study.folder import RunFolder
from batchnorm.study.plan import Run
from batchnorm.study.pool import InProcess, Pool, Workers
from batchnorm.study.records import Records
from batchnorm.study.summary import summarise
from batchnorm.study.underway import OnEvent, UnderWay


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

    def tell(text: str) -> None:
        if on_event is not None:
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
        study = _Study(folder, config, found, on_event)
        study.go(workers or available_cores(), found if going_on else None)
        summary = summarise(folder.path, command=command)
        folder.write_summary(summary)
    return summary


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Study(UnderWay):
    """A session of the study: sections plan its runs, again and again as results come in."""

    def __init__(self, folder: RunFolder, config: StudyConfig, found: Records, on_event: OnEvent | None) -> None:
        super().__init__(folder, config.seed, found, on_event)
        self.config = config
        self._later: dict[str, float] = {}

    def go(self, workers: int, resumed: Records | None) -> None:
        for name in self.config.sections:
            self._plan(name)
        self.started(workers)
        if resumed is not None:
            self.emit(events.StudyResumed, finished=self.finished(), dropped=resumed.dropped)
        if self.queue:
            pool: Pool = InProcess(sections.execute) if workers == 1 else Workers(workers, sections.execute)
            try:
                self.work(pool)
            finally:
                pool.close()
                self.note_seconds()
        by_section = sorted(self.known.values(), key=lambda run: self.config.sections.index(run.section))
        self.put_in_order(run.id for run in by_section)

    def follow_up(self, run: Run) -> None:
        """Ask a section once more when all its known runs are done."""
        if all(other.id in self.done for other in self.known.values() if other.section == run.section):
            self._plan(run.section)

    def later(self) -> float:
        """What the sections expect."""
        return sum(self._later.values())

    def _plan(self, name: str) -> None:
        plan = sections.plan(name, self.config, Records(tuple(self.lines)))
        self._later[name] = plan.later
        self.add(plan.runs)
        # Follow-up runs go first: the longer the way, the earlier it has to begin.
        order = {name: place for place, name in enumerate(self.config.sections)}
        self.queue.sort(key=lambda run: (order[run.section], -run.cost))
