"""A Ray cluster of this machine, for tests: two workers, in a folder of its own, that talks to nobody."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# One for the process: Ray reads it once and keeps it, so that a second cluster with another one would refuse its own
# driver. Without any, it would be written to the user's home.
TOKEN = secrets.token_hex(16)


@contextmanager
def cluster(lock: Path) -> Iterator[Any]:
    """Start it and stop it. ``lock`` is a file that all test processes share: clusters start one after the other.

    Two that start at once look for free ports at once, and one of them fails.
    """
    import fcntl

    import ray

    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="bn-ray-") as folder:
        for name, value in environment.items():
            patch.setenv(name, value)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=150 * 2**20,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=folder,
            )
        try:
            yield ray
        finally:
            ray.shutdown()


def lock_of(factory: pytest.TempPathFactory) -> Path:
    """The file that the processes of one test run share; it goes with pytest's own folders."""
    base = factory.getbasetemp()
    # Each process of pytest-xdist has a folder inside that of the run.
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ray.lock"
