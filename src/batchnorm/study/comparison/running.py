"""One run: train a variant at a rate, look at validation now and then, and at the test where validation is best."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from batchnorm._errors import MissingDependencyError
from batchnorm.study.comparison import state
from batchnorm.study.comparison.job import Job, as_records, scaler, step, synchronized
from batchnorm.study.comparison.state import Progress
from batchnorm.study.plan import Report, Run
from batchnorm.study.records import Record

DIVERGED = "diverged"
# A run's own random numbers (dropout) begin here, whatever its factory has drawn.
_TRAINING = 7919


def execute(job: Job, run: Run, report: Report) -> list[Record]:
    """The records of a run.

    Its params: ``lr``; ``after``, the step that an earlier run of the trajectory came to; ``at``, the steps of its
    evaluations; ``test``, whether the test part is looked at. It goes on from the trajectory's file where there is one.
    """
    with job.computing(run.seed):
        return _Run(job, run, report).go()


class _Run:
    """The state of a run under way."""

    def __init__(self, job: Job, run: Run, report: Report) -> None:
        self.job, self.run, self.report = job, run, report
        self.lr, self.after = float(run.params["lr"]), int(run.params["after"])
        self.at = frozenset(run.params["at"])
        self.sign = 1.0 if job.objective.higher else -1.0
        self.model, self.same = job.build(run.variant, run.seed)
        self.called: Any = job.compiled(self.model)
        self.optimizer = job.make_optimizer(self.model, self.lr)
        self.scale = scaler(job)
        self.path = None if job.states is None else state.path_of(job.states, run.variant, self.lr, run.seed)
        self.saved = time.monotonic()

    def go(self) -> list[Record]:
        run, job = self.run, self.job
        torch.manual_seed(_TRAINING + run.seed)
        self.progress = self._found() or Progress(run.id)
        with _writer(job, run, self.progress.step) as self.board:
            self._train()
        lines = self.progress.lines
        end = lines[-1]["step"] if lines else run.steps
        if run.params.get("test"):
            if self.progress.best is not None:
                value, place, test = self.progress.best
                lines.append(run.record(place, "best_validation", value))
                lines.append(run.record(place, "test", test))
            lines.append(run.record(0, "same_weights", self.same[0], of=self.same[1]))
        lines.append(run.record(end, "seconds", round(self.progress.seconds, 4), what="training"))
        return [*lines, run.finished(end)]

    def _found(self) -> Progress | None:
        """The trajectory so far, where its file is of use to this run."""
        if self.path is None or not self.path.exists():
            return None
        found = state.load(self.path, self.model, self.optimizer, self.scale, self.job.device)
        if found is None or found.step > self.run.steps:
            # Nothing may be left of a file that is not used: begin from the same weights again.
            self.__init__(self.job, self.run, self.report)  # type: ignore[misc]
            torch.manual_seed(_TRAINING + self.run.seed)
            return None
        if found.run != self.run.id:
            found.run, found.lines, found.best = self.run.id, [], None
        return found

    def _train(self) -> None:
        progress, run, job = self.progress, self.run, self.job
        if any(line["metric"] == DIVERGED for line in progress.lines):
            return
        self.model.train()
        if progress.step == 0 and 0 in self.at and not progress.lines and self.after == 0:
            self._look(0)
        batches = job.stream(run.seed, progress.step)
        begun = time.perf_counter()
        for number in range(progress.step + 1, run.steps + 1):
            loss = step(job, self.called, self.optimizer, self.scale, next(batches).to(torch.device(job.device)))
            progress.step = number
            if number not in self.at or number <= self.after:
                continue
            synchronized(job.device)
            progress.seconds += time.perf_counter() - begun
            if not math.isfinite(float(loss)) or not self._look(number):
                progress.lines.append(run.record(number, DIVERGED, True))
                break
            if time.monotonic() - self.saved > job.checkpoint_every:
                self._save()
            begun = time.perf_counter()
        # The next rung of the search goes on from here; and a kill before the records are written loses nothing.
        self._save()

    def _look(self, number: int) -> bool:
        """Evaluate; False where the outputs are no numbers."""
        progress, run = self.progress, self.run
        found = as_records(self.job.evaluate(self.model, "validation"))
        value = found["metric"]
        progress.lines.append(run.record(number, "validation", value))
        if self.job.objective.metric != "loss":
            progress.lines.append(run.record(number, "validation_loss", found["loss"]))
        if self.board is not None and value is not None:
            self.board.add_scalar(f"validation/{self.job.objective.metric}", value, number)
        self.report(number, value)
        if value is None:
            return False
        if run.params.get("test") and (progress.best is None or self.sign * (value - progress.best[0]) > 0):
            progress.best = (value, number, as_records(self.job.evaluate(self.model, "test"))["metric"])
        return True

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.path is not None:
            state.save(self.path, self.progress, self.model, self.optimizer, self.scale, self.job.device)


@contextlib.contextmanager
def _writer(job: Job, run: Run, after: int) -> Iterator[Any]:
    if job.tensorboard is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "scalars for TensorBoard need tensorboard, which is not installed: pip install 'batchnorm[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(job.tensorboard / run.id.replace("/", "_")), purge_step=after + 1 if after else None)
    try:
        yield writer
    finally:
        writer.close()
