"""Runs over a Ray cluster: each is a trial of Ray Tune. The only file of the study that imports ray."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from batchnorm._errors import MissingDependencyError
from batchnorm.study.comparison.job import Job
from batchnorm.study.comparison.running import execute
from batchnorm.study.plan import Run
from batchnorm.study.pool import Done, Progress, RunFailedError

# Every report goes through Ray's controller.
_REPORT_EVERY = 2.0
# A trial whose machine goes away is started again, and goes on from its checkpoint where the folder is shared.
_RETRIES = 2
# Seconds for trials to stop, once they are told to.
_PATIENCE = 15.0


def need_tune() -> Any:
    """``ray.tune``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # Tune imports Ray Train, whose second version asks for pydantic; nothing of it is used here.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Records are ours; Tune's own files would only be written twice.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    try:
        import ray.tune
    except ImportError as error:
        raise MissingDependencyError(
            f"a Ray address needs Ray Tune, which cannot be imported ({error}): pip install 'ray[tune]'"
        ) from error
    return ray.tune


class TunePool:
    """A pool of trials. Runs that wait for nothing go together, as one experiment; each is told of when it is done.

    Args:
        address: of the cluster: "local" starts one on this machine, "auto" finds the running one, or "ray://host:port".
        job: goes to the cluster once. Its folder of states should be one that all machines see: else a run that has to
            go on from another begins anew, with the same result.

    Raises:
        MissingDependencyError: Ray Tune is not installed.
        ConnectionError: there is no cluster at the address.
    """

    def __init__(self, address: str, job: Job) -> None:
        self.tune = need_tune()
        import ray

        self.ray, self.job = ray, job
        self.started = not ray.is_initialized()
        if self.started:
            local = address == "local"
            ray.init(address=None if local else address, include_dashboard=False, log_to_driver=False)
        self.logs = [logging.getLogger(name) for name in ("ray.tune", "ray.air")]
        self.levels = [logger.level for logger in self.logs]
        for logger in self.logs:
            logger.setLevel(logging.ERROR)
        self.waiting: list[Run] = []
        self.news: queue.Queue[Progress | Done | BaseException] = queue.Queue()
        self.closed = False
        self.threads: list[threading.Thread] = []
        self.storage = tempfile.mkdtemp(prefix="batchnorm-ray-")
        _pools[self.storage] = self

    def idle(self) -> int:
        """Always one more: the cluster queues what does not fit."""
        return 1

    def submit(self, run: Run) -> None:
        """Keep the run for the next experiment."""
        self.waiting.append(run)

    def wait(self, on_progress: Callable[[Progress], None]) -> list[Done]:
        """Start what waits, and wait for news.

        Raises:
            RunFailedError: a run failed, more than once where its machine went away.
        """
        if self.waiting:
            wave, self.waiting = self.waiting, []
            self.threads.append(threading.Thread(target=self._experiment, args=(wave,), daemon=True))
            self.threads[-1].start()
        item = self.news.get()
        if isinstance(item, Progress):
            on_progress(item)
            return []
        if isinstance(item, Done):
            return [item]
        # The last line of a trace from another machine says what happened.
        why = (str(item).strip().splitlines() or [type(item).__name__])[-1]
        raise RunFailedError(f"a run on Ray failed: {why[:300]}; resume after mending the cause")

    def close(self) -> None:
        """Stop the trials, and the cluster where this started it."""
        self.closed = True
        _pools.pop(self.storage, None)
        for logger, level in zip(self.logs, self.levels, strict=True):
            logger.setLevel(level)
        # Tune writes its state once more at its end: the folder would be there again.
        for thread in self.threads:
            thread.join(_PATIENCE)
        if self.started:
            self.ray.shutdown()
        shutil.rmtree(self.storage, ignore_errors=True)

    def _experiment(self, wave: list[Run]) -> None:
        try:
            self._fit(wave)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the waiting thread has to hear of it
            if not self.closed:
                self.news.put(error)

    def _fit(self, wave: list[Run]) -> None:
        from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig
        from ray.tune.stopper import FunctionStopper

        # Tune writes its callbacks down: they hold this pool's name, not the pool.
        key, runs = self.storage, {run.id: run for run in wave}

        class Telling(Callback):
            """Hands on what trials report."""

            def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:  # noqa: ARG002
                run = runs[trial.config["run"]["id"]]
                if result.get("block") is not None:
                    _tell(key, Done(run, result["block"]))
                else:
                    _tell(key, Progress(run, result["step"], result["value"]))

        threads = max(1, self.job.threads)
        resources = {"cpu": threads, "gpu": 1 if self.job.device.startswith("cuda") else 0}
        trainable = self.tune.with_resources(self.tune.with_parameters(_trial, job=self.job), resources)
        tuner = self.tune.Tuner(
            trainable,
            param_space={"run": self.tune.grid_search([_plain(run) for run in wave])},
            tune_config=TuneConfig(reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id),
            run_config=RunConfig(
                storage_path=self.storage,
                callbacks=[Telling()],
                failure_config=FailureConfig(max_failures=_RETRIES),
                stop=FunctionStopper(lambda *_: _is_closed(key)),
                verbose=0,
            ),
        )
        for result in tuner.fit():
            if result.error is not None:
                self.news.put(result.error)


_pools: dict[str, TunePool] = {}


def _tell(key: str, item: Progress | Done) -> None:
    if key in _pools:
        _pools[key].news.put(item)


def _is_closed(key: str) -> bool:
    return key not in _pools


def _trial(config: dict[str, Any], job: Job) -> None:
    """One run, in a process of the cluster."""
    from ray import tune

    last = time.monotonic()

    def report(step: int, value: float | None) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_EVERY:
            last = time.monotonic()
            tune.report({"step": step, "value": value, "block": None})

    run = Run(**config["run"])
    if job.states is not None:
        job.states.mkdir(parents=True, exist_ok=True)
    tune.report({"step": run.steps, "value": None, "block": execute(job, run, report)})


def _plain(run: Run) -> dict[str, Any]:
    return {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
