"""Each run a trial of Ray Tune, on a cluster of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import batchnorm as bn
from ray_cluster import cluster, lock_of
from study.comparison import tiny
from study.comparison.tiny import compare, measured

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray, on a cluster of its own."""
    from batchnorm.study.comparison.raytune import need_tune

    try:
        need_tune()
    except bn.MissingDependencyError as missing:
        pytest.skip(str(missing))
    with cluster(lock_of(tmp_path_factory)) as ray:
        yield ray


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
