"""Two processes that run the bodies of tests: ``@on_both_ranks`` on a function of ``rank`` makes it a test.

The pair is started once and kept, because importing torch costs seconds. It meets through a file, on no port of ours.
A body that fails, or does not end, fails its test with the worker's traceback; after one that does not end the pair is
thrown away and the next test starts another.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import importlib.util
import inspect
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RANKS = 2
COLLECTIVE = dt.timedelta(seconds=60)  # what a rank waits for the other
BODY = 120.0  # seconds for a test's body, compilation included


class Pair:
    """The two processes and the pipes to them."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="batchnorm-pair-")
        start = multiprocessing.get_context("spawn")
        pipes = [start.Pipe() for _ in range(RANKS)]
        meeting = str(Path(self.folder.name) / "meeting")
        self.pipes = [ours for ours, _ in pipes]
        self.workers = [
            start.Process(target=serve, args=(rank, meeting, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for worker, (_, theirs) in zip(self.workers, pipes, strict=True):
            worker.start()
            theirs.close()

    def run(self, file: str, name: str, arguments: dict[str, Any]) -> None:
        """Run a body on both ranks; raises AssertionError with the tracebacks of those where it failed."""
        deadline = time.monotonic() + BODY
        for pipe in self.pipes:
            pipe.send((file, name, arguments))
        failures = []
        for rank, pipe in enumerate(self.pipes):
            try:
                failure = pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else "did not end in time"
            except EOFError:
                failure = "died"
            if failure:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.close()  # whatever is left in flight between them would spoil the next test
            pytest.fail("\n".join(failures), pytrace=False)

    @property
    def alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    def close(self) -> None:
        """Ends both; what does not end by itself is killed."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for worker in self.workers:
            worker.join(2)
            worker.kill()
            worker.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()


def serve(rank: int, meeting: str, pipe: Any) -> None:
    """A worker: runs what comes through the pipe until nothing more comes."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=COLLECTIVE
    )
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.", DeprecationWarning)
    warnings.filterwarnings("ignore", "batchnorm runs on its slower reference implementation", RuntimeWarning)
    with contextlib.suppress(EOFError):
        while (job := pipe.recv()) is not None:
            file, name, arguments = job
            torch.manual_seed(0)
            try:
                getattr(module(file), name).body(rank, **arguments)
                failure = ""
            except BaseException:  # noqa: BLE001 - reported to the test
                failure = traceback.format_exc()
            with contextlib.suppress(BrokenPipeError):
                pipe.send(failure)
    distributed.destroy_process_group()


@functools.cache
def module(file: str) -> Any:
    """The test's module, which a worker loads by its path."""
    spec = importlib.util.spec_from_file_location(f"on_a_rank_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def on_both_ranks(body: Callable[..., None]) -> Callable[..., None]:
    """Make ``body(rank, ...)`` a test that runs on both ranks at once; its other parameters are the test's."""

    def test(pair: Callable[[], Pair], **arguments: Any) -> None:
        pair().run(inspect.getfile(body), body.__name__, arguments)

    _, *others = inspect.signature(body).parameters.values()
    fixture = inspect.Parameter("pair", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    test.__signature__ = inspect.Signature([fixture, *others])  # type: ignore[attr-defined]
    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.body = body  # type: ignore[attr-defined]
    return test


def running() -> Iterator[Callable[[], Pair]]:
    """For a fixture of the session: a function that gives the pair, started when first asked for."""
    pairs: list[Pair] = []

    def current() -> Pair:
        if not pairs or not pairs[-1].alive:
            pairs.append(Pair())
        return pairs[-1]

    yield current
    for pair in pairs:
        if pair.alive:
            pair.close()
