"""A comparison under way: calibrate, search, measure; keep the records; go on after an interruption."""

from __future__ import annotations

import contextlib
import functools
import pickle
import shutil
import time
from collections.abc import Callable

from batchnorm._errors import InputError, OutputError, RecordsError
from batchnorm.study import events, records
from batchnorm.study.comparison import costs, planning
from batchnorm.study.comparison.job import Job
from batchnorm.study.comparison.running import execute
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.folder import ENVIRONMENT, RunFolder, environment
from batchnorm.study.plan import Run
from batchnorm.study.pool import Done, InProcess, Pool, Progress, Workers
from batchnorm.study.records import Record, Records

OnEvent = Callable[[events.Event], None]
STATES = "states"
_SESSION = f"{ENVIRONMENT.id}/session"
_ENOUGH_TO_ESTIMATE = 0.03
# Of a budget, what the measurement of its costs may take; of steps, when no budget is given.
_CALIBRATION, _LONGEST = 0.04, 10.0


def begin(folder: RunFolder, config: CompareConfig, resume: bool) -> tuple[CompareConfig, Records, bool]:
    """Start the folder, or open it again.

    Returns:
        The configuration (a resumed one keeps its own), the records so far, and whether it goes on.

    Raises:
        RecordsError: the folder holds something else, or damaged records.
        ConfigError: it was started with another configuration.
        OutputError: it cannot be written.
    """
    if resume and folder.started():
        saved = CompareConfig.load(folder.config_file)
        saved.check_same(config)
        if not folder.records_file.exists():
            records.append(folder.records_file, _environment(config))
        return saved, records.repair(folder.records_file), True
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        occupied = sorted(item.name for item in folder.path.iterdir())
    except OSError as error:
        raise OutputError(f"cannot use {folder.path} as the folder: {error.strerror or error}") from error
    if occupied:
        what = "a run" if folder.started() else f"other files ({occupied[0]})"
        raise RecordsError(f"{folder.path} already holds {what}: resume it, or choose another folder")
    block = _environment(config)
    records.write_whole(folder.config_file, config.to_toml().encode())
    records.append(folder.records_file, block)
    return config, Records(tuple(block)), False


class Session:
    """The state of one session: what is known, under way and done."""

    def __init__(
        self, folder: RunFolder, config: CompareConfig, found: Records, job: Job, on_event: OnEvent | None
    ) -> None:
        self.folder, self.config, self.job = folder, config, job
        self.lines: list[Record] = list(found)
        self.on_event = on_event or (lambda _: None)
        self.began = time.monotonic()
        self.known: dict[str, Run] = {}
        self.queue: list[Run] = []
        self.partial: dict[str, float] = {}
        self.later = 0.0
        self.done = set(found.finished())
        self.fraction = self.first = 0.0

    def go(self, workers: int, pool: Pool | None = None) -> None:
        """Run what is left to run."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder.path / "summary.json").unlink()
        try:
            if costs.RUN not in self.done:
                self._calibrate()
            # Sums are added in one order: a resume takes the threads that it began with.
            self.job.threads = Records(tuple(self.lines)).where(section="calibrate").value("threads", 0)
            self.config = planning.settled(self.config, Records(tuple(self.lines)))
            self._plan()
            self.first = self._advance()
            left = sum(run.cost for run in self.queue) + self.later
            self._emit(events.StudyStarted, runs=len(self.known), workers=workers, expected=left / workers)
            if self.done - {ENVIRONMENT.id, _SESSION, costs.RUN}:
                self._emit(events.StudyResumed, finished=self._finished(), dropped="")
            if self.queue:
                pool = pool or self._pool(workers)
                try:
                    self._work(pool)
                finally:
                    pool.close()
        finally:
            self._note_seconds()
        self._put_in_order()
        shutil.rmtree(self.folder.path / STATES, ignore_errors=True)
        self.fraction = 1.0
        self._emit(events.StudyFinished, runs=len(self.known))

    def _pool(self, workers: int) -> Pool:
        run = functools.partial(execute, self.job)
        if workers == 1:
            return InProcess(run)
        try:
            pickle.dumps(self.job)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"expected a model, data and variants that can go to other processes, got {error}: define them in a "
                "module, or take workers=1"
            ) from error
        return Workers(workers, run)

    def _calibrate(self) -> None:
        config = self.config
        seconds = min(config.budget * _CALIBRATION, _LONGEST) if config.budget else 1.0
        self._keep_lines(costs.calibrate(self.job, config.lrs[0], seconds, config.seed))

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

    def _plan(self) -> None:
        wanted = planning.plan(self.config, Records(tuple(self.lines)))
        self.later = wanted.later
        for run in wanted.runs:
            if run.id not in self.known:
                self.known[run.id] = run
                if run.id not in self.done:
                    self.queue.append(run)
        # Searches first: what is measured waits for them. Then seed by seed, so that pairs are there early.
        self.queue.sort(key=lambda run: (run.section != "search", run.seed))

    def _keep_lines(self, block: list[Record]) -> None:
        records.append(self.folder.records_file, block)
        self.lines += block
        self.done.add(block[-1]["run"])

    def _keep(self, done: Done) -> None:
        self._keep_lines(done.block)
        self.partial.pop(done.run.id, None)
        self._plan()
        self._advance()
        values = [line["value"] for line in done.block if line["metric"] == "validation"]
        self._emit(
            events.RunFinished,
            **_names(done.run),
            step=done.block[-1]["step"],
            accuracy=values[-1] if values else None,
            finished_runs=self._finished(),
            known_runs=len(self.known),
        )

    def _finished(self) -> int:
        return len(self.done & self.known.keys())

    def _progress(self, progress: Progress) -> None:
        run = progress.run
        start = run.params["after"]
        self.partial[run.id] = run.cost * max(progress.step - start, 0) / max(run.steps - start, 1)
        self._advance()
        self._emit(events.RunProgress, **_names(run), step=progress.step, accuracy=progress.accuracy)

    def _advance(self) -> float:
        whole = sum(run.cost for run in self.known.values()) + self.later
        done = sum(run.cost for run in self.known.values() if run.id in self.done) + sum(self.partial.values())
        self.fraction = max(self.fraction, min(done / whole, 1.0) if whole else 0.0)
        return self.fraction

    def _emit(self, kind: Callable[..., events.Event], **fields: object) -> None:
        passed = time.monotonic() - self.began
        gained = self.fraction - self.first
        left = passed / gained * (1 - self.fraction) if gained > _ENOUGH_TO_ESTIMATE else None
        self.on_event(kind(fraction=self.fraction, seconds_left=left, seconds=passed, **fields))

    def _note_seconds(self) -> None:
        run = Run(_SESSION, "environment", "environment", self.config.seed, 0, 0.0)
        block = [run.record(0, "seconds", round(time.monotonic() - self.began, 3), what="session"), run.finished(0)]
        with contextlib.suppress(OSError):  # an error that is already on its way must not be hidden by this one
            records.append(self.folder.records_file, block)
            self.lines += block

    def _put_in_order(self) -> None:
        """Write the records in the plan's order, which does not depend on which worker was the faster."""
        wanted = planning.plan(self.config, Records(tuple(self.lines))).runs
        order = {name: place for place, name in enumerate([ENVIRONMENT.id, costs.RUN, *(run.id for run in wanted)])}
        inner = sorted((line for line in self.lines if line["run"] in order), key=lambda line: order[line["run"]])
        sessions = [line for line in self.lines if line["run"] == _SESSION and line["metric"] == "seconds"]
        if sessions:
            whole = sessions[0] | {"value": round(sum(line["value"] for line in sessions), 3)}
            inner += [whole, whole | {"metric": records.FINISHED, "value": True}]
        self.lines = inner
        records.rewrite(self.folder.records_file, inner)


def _environment(config: CompareConfig) -> list[Record]:
    found = environment(config.seed)
    run = Run(ENVIRONMENT.id, "environment", "environment", config.seed, 0, 0.0)
    device = config.device
    if device.startswith("cuda"):
        import torch

        device = f"{device}: {torch.cuda.get_device_name(device)}"
    return [*found[:-1], run.record(0, "device", device), found[-1]]


def _names(run: Run) -> dict[str, object]:
    return {"run": run.id, "section": run.section, "variant": run.variant, "seed": run.seed, "steps": run.steps}
