"""Runs side by side: worker processes, one torch thread each, that report as they go and never outlive their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from batchnorm._errors import BatchnormError
from batchnorm.study.plan import Report, Run
from batchnorm.study.records import Record

Execute = Callable[[Run, Report], list[Record]]
# A terminal redraws a few times a second; more messages would only cost the runs time.
_REPORT_EVERY = 0.2


class RunFailedError(BatchnormError, RuntimeError):
    """A run of the study failed; the message names it and says why."""


@dataclass(frozen=True)
class Done:
    """A run came to its end."""

    run: Run
    block: list[Record]


@dataclass(frozen=True)
class Progress:
    """A run has come to ``step``."""

    run: Run
    step: int
    accuracy: float | None


class Pool(Protocol):
    """Something that executes runs."""

    def idle(self) -> int:
        """How many more runs it can take now."""

    def submit(self, run: Run) -> None:
        """Begin a run."""

    def wait(self, on_progress: Callable[[Progress], None]) -> list[Done]:
        """Wait for news; progress goes to ``on_progress``, finished runs are returned (perhaps none)."""

    def close(self) -> None:
        """Stop at once, whatever is under way."""


class InProcess:
    """Runs one after the other, in this process."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._next: Run | None = None

    def idle(self) -> int:
        """One, unless a run waits."""
        return 0 if self._next else 1

    def submit(self, run: Run) -> None:
        """Keep the run for the next ``wait``."""
        self._next = run

    def wait(self, on_progress: Callable[[Progress], None]) -> list[Done]:
        """Execute the submitted run.

        Raises:
            RunFailedError: it failed.
        """
        run, self._next = self._next, None
        if run is None:
            return []
        try:
            block = self._execute(run, lambda step, accuracy: on_progress(Progress(run, step, accuracy)))
        except Exception as error:
            raise RunFailedError(_failure(run, f"{type(error).__name__}: {error}")) from error
        return [Done(run, block)]

    def close(self) -> None:
        """Nothing to stop."""


class Workers:
    """Worker processes, started fresh (spawn: torch's threads do not survive a fork)."""

    def __init__(self, count: int, execute: Execute) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, SpawnProcess] = {}
        self._current: dict[Connection, Run] = {}
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, execute), daemon=True)
            with _interrupts_held():
                process.start()
            theirs.close()
            self._processes[ours] = process

    def idle(self) -> int:
        """How many workers have no run."""
        return len(self._processes) - len(self._current)

    def submit(self, run: Run) -> None:
        """Hand the run to an idle worker."""
        pipe = next(pipe for pipe in self._processes if pipe not in self._current)
        self._current[pipe] = run
        pipe.send(run)

    def wait(self, on_progress: Callable[[Progress], None]) -> list[Done]:
        """Wait until a worker has news.

        Raises:
            RunFailedError: a run failed, or its worker died.
        """
        finished = []
        for pipe in wait(list(self._current)):
            assert isinstance(pipe, Connection)
            run = self._current[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                self._processes[pipe].join()
                code = self._processes[pipe].exitcode
                raise RunFailedError(_failure(run, f"its process died (exit code {code})")) from None
            if kind == "progress":
                on_progress(Progress(run, *value))
            elif kind == "done":
                del self._current[pipe]
                finished.append(Done(run, value))
            else:
                message, trace = value
                error = RunFailedError(_failure(run, message))
                error.add_note(trace)
                raise error
        return finished

    def close(self) -> None:
        """Terminate the workers and wait until they are gone."""
        for process in self._processes.values():
            process.terminate()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for the block, and from a process that is started in it for good.

    It reaches the whole group: the parent decides, the workers wait to be told. Without this, one that comes while a
    worker is still importing would end it with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, however far it is in a run that might take hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(pipe: Connection, execute: Execute) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        try:
            run = pipe.recv()
        except (EOFError, OSError):
            return  # the parent is gone
        try:
            message: tuple[str, Any] = ("done", execute(run, _throttled(pipe)))
        except BrokenPipeError:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            message = ("failed", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        try:
            pipe.send(message)
        except OSError:
            return


def _throttled(pipe: Connection) -> Report:
    last = 0.0

    def report(step: int, accuracy: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_EVERY:
            last = now
            pipe.send(("progress", (step, accuracy)))

    return report


def _failure(run: Run, why: str) -> str:
    first = why.splitlines()[0]
    return f"run {run.id} failed: {first}; finished runs are kept, resume after mending the cause"
