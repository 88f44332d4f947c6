"""Each run a trial of Ray Tune, on a cluster of this machine."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

import batchnorm as bn
from study.comparison import tiny
from study.comparison.tiny import compare, measured

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two workers, in a folder of its own, that talks to nobody."""
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),  # or it would be written to the user's home
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="bn-ray-") as folder:
        for name, value in environment.items():
            patch.setenv(name, value)
        from batchnorm.study.comparison.raytune import need_tune

        try:
            need_tune()
        except bn.MissingDependencyError as missing:
            pytest.skip(str(missing))
        import ray

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


def test_trials_come_out_as_runs_here(cluster, tmp_path):
    options = {"lrs": [0.1], "steps": 6, "seeds": 1}
    here = compare(tiny.plain, **options)
    there = compare(tiny.plain, ray="auto", out=tmp_path, **options)
    assert measured(there) == measured(here)
    assert there.summary.complete
    assert cluster.is_initialized()  # it was not ours to stop


@pytest.mark.usefixtures("cluster")
def test_a_trial_that_fails_is_said(monkeypatch):
    monkeypatch.setattr("batchnorm.study.comparison.raytune._RETRIES", 0)
    with pytest.raises(bn.study.RunFailedError, match=r"a run on Ray failed: .+; resume after mending the cause"):
        compare(tiny.plain, metric=fails_elsewhere(os.getpid()), ray="auto", lrs=[0.1], steps=6, seeds=1)


def fails_elsewhere(here: int) -> Any:
    def metric(output, target):  # noqa: ARG001
        if os.getpid() != here:
            raise OSError("no such place")
        return 1.0

    return metric


def test_without_tune_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.tune", None)
    with pytest.raises(bn.MissingDependencyError, match=r"pip install 'ray\[tune\]'"):
        compare(ray="local")
