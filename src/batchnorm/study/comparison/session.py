"""A comparison under way: calibrate, search, measure; keep the records; go on after an interruption."""

from __future__ import annotations

import contextlib
import functools
import pickle
import shutil

from batchnorm._errors import InputError, OutputError, RecordsError
from batchnorm.study import events, records
from batchnorm.study.comparison import costs, planning
from batchnorm.study.comparison.job import Job
from batchnorm.study.comparison.running import execute
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.folder import ENVIRONMENT, RunFolder, environment
from batchnorm.study.plan import Run
from batchnorm.study.pool import InProcess, Pool, Workers
from batchnorm.study.records import Record, Records
from batchnorm.study.underway import SESSION, OnEvent, UnderWay

STATES = "states"
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


class Session(UnderWay):
    """A session of a comparison: searches of learning rates, and the measurements that wait for them."""

    metric = "validation"

    def __init__(
        self, folder: RunFolder, config: CompareConfig, found: Records, job: Job, on_event: OnEvent | None
    ) -> None:
        super().__init__(folder, config.seed, found, on_event)
        self.config, self.job = config, job
        self._later = 0.0

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
            self.started(workers)
            if self.done - {ENVIRONMENT.id, SESSION, costs.RUN}:
                self.emit(events.StudyResumed, finished=self.finished(), dropped="")
            if self.queue:
                pool = pool or self._pool(workers)
                try:
                    self.work(pool)
                finally:
                    pool.close()
        finally:
            self.note_seconds()
        wanted = planning.plan(self.config, Records(tuple(self.lines))).runs
        self.put_in_order([costs.RUN, *(run.id for run in wanted)])
        shutil.rmtree(self.folder.path / STATES, ignore_errors=True)

    def follow_up(self, run: Run) -> None:  # noqa: ARG002 - any of them may settle a search
        """Plan anew."""
        self._plan()

    def later(self) -> float:
        """The measurements that wait for a search."""
        return self._later

    def start_of(self, run: Run) -> int:
        """A search that goes on begins where it was left."""
        return int(run.params["after"])

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
        self.keep(costs.calibrate(self.job, config.lrs[0], seconds, config.seed))

    def _plan(self) -> None:
        wanted = planning.plan(self.config, Records(tuple(self.lines)))
        self._later = wanted.later
        self.add(wanted.runs)
        # Searches first: what is measured waits for them. Then seed by seed, so that pairs are there early.
        self.queue.sort(key=lambda run: (run.section != "search", run.seed))


def _environment(config: CompareConfig) -> list[Record]:
    found = environment(config.seed)
    run = Run(ENVIRONMENT.id, "environment", "environment", config.seed, 0, 0.0)
    device = config.device
    if device.startswith("cuda"):
        import torch

        device = f"{device}: {torch.cuda.get_device_name(device)}"
    return [*found[:-1], run.record(0, "device", device), found[-1]]
