"""transform_file: what an interrupt or a kill leaves is gone on with, to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchnorm._errors import InputError, OutputError
from batchnorm.preprocessing import StandardScaler, transform_file
from batchnorm.preprocessing.sinks.sink import AppendingSink
from batchnorm.preprocessing.sinks.tables import SegmentedSink
from preprocessing.sink_files import (
    ARRAYS,
    ROWS,
    SCALER,
    WRITE,
    X,
    named,
    same,
    source,
)


@pytest.fixture(params=sorted(WRITE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


KILLED = """
import sys
from batchnorm.preprocessing import load, transform_file
from batchnorm.preprocessing.sinks.sink import AppendingSink
from batchnorm.preprocessing.sinks.tables import SegmentedSink
AppendingSink.interval = SegmentedSink.interval = 0.0
stats, src, dst = sys.argv[1:]
def progress(done, total):
    print(done, flush=True)
    sys.stdin.readline()  # the other end says when to go on, or kills
transform_file(load(stats), src, dst, batch_rows=60, progress=progress)
"""


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stop", [130, 333, 499])
def test_what_a_kill_leaves_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, files: int, stop: int
) -> None:
    for base in (AppendingSink, SegmentedSink):
        monkeypatch.setattr(base, "interval", 0.0)
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    columns = ["x"] if kind in ("npz", "safetensors") else None
    src, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    src.mkdir()
    for number in range(files):
        WRITE[kind](src / f"part-{number}.{kind}")
    work, snapshot = tmp_path / "out.partial", tmp_path / "snapshot"

    def progress(done: int, _: int | None) -> None:
        # What is on the disk in the middle of it all, with what the process has not written yet missing.
        if done >= stop * files:
            shutil.copytree(work, snapshot)
            raise KeyboardInterrupt

    def run(target: Path, **options: Any) -> Any:
        return transform_file(estimator, src, target, columns=columns, batch_rows=60, **options)

    with pytest.raises(KeyboardInterrupt):
        run(out, progress=progress)
    shutil.rmtree(work)
    snapshot.rename(work)
    with pytest.raises(OutputError, match=r"holds an interrupted transform, [0-9,]+ rows of it: go on with it"):
        run(out)
    assert not out.exists()
    done = run(out, resume=True)
    assert done.rows == ROWS * files
    assert (stop - 120) * files <= done.resumed < done.rows
    run(whole)
    for number in range(files):
        same(out / f"part-{number}.{kind}", whole / f"part-{number}.{kind}")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_killed_process_is_gone_on_with(tmp_path: Path, kind: str) -> None:
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    estimator.save(tmp_path / "stats.safetensors")
    src, out, whole = source(tmp_path, kind), tmp_path / f"out.{kind}", tmp_path / f"whole.{kind}"
    words = [sys.executable, "-c", KILLED, str(tmp_path / "stats.safetensors"), str(src), str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdout.readline()
        process.kill()
    assert not out.exists()
    done = transform_file(estimator, src, out, batch_rows=60, resume=True)
    assert done.rows == ROWS
    assert 180 <= done.resumed < ROWS
    transform_file(estimator, src, whole, batch_rows=60)
    same(out, whole)


def interrupt_after(rows: int) -> Callable[[int, int | None], None]:
    def progress(done: int, total: int | None) -> None:
        assert total in (ROWS, None)
        if done >= rows:
            raise KeyboardInterrupt

    return progress


def test_an_interrupt_keeps_what_is_done_even_between_checkpoints(tmp_path: Path, kind: str) -> None:
    estimator = SCALER if kind in ARRAYS else named(SCALER)
    columns = ["x"] if kind in ("npz", "safetensors") else None
    path, out = source(tmp_path, kind), tmp_path / f"out.{kind}"
    with pytest.raises(KeyboardInterrupt):
        transform_file(estimator, path, out, batch_rows=100, columns=columns, progress=interrupt_after(200))
    done = transform_file(estimator, path, out, batch_rows=100, columns=columns, resume=True)
    assert done.resumed >= 200
    transform_file(estimator, path, tmp_path / f"whole.{kind}", batch_rows=100, columns=columns)
    same(out, tmp_path / f"whole.{kind}")


def test_a_transform_only_goes_on_as_the_same(tmp_path: Path) -> None:
    path, out = source(tmp_path, "npy"), tmp_path / "out.npy"

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            transform_file(SCALER, path, out, batch_rows=100, progress=interrupt_after(200), overwrite=True)

    interrupted()
    with pytest.raises(InputError, match=r"cannot go on with .*: the statistics are others"):
        transform_file(StandardScaler().fit(X + 1), path, out, batch_rows=100, resume=True)
    with pytest.raises(InputError, match="the options are others"):
        transform_file(SCALER, path, out, batch_rows=100, resume=True, dtype="float32")
    with pytest.raises(InputError, match="batch_rows is another"):
        transform_file(SCALER, path, out, batch_rows=101, resume=True)
    later = time.time() + 5
    os.utime(path, (later, later))
    with pytest.raises(InputError, match="the data have changed"):
        transform_file(SCALER, path, out, batch_rows=100, resume=True)
    # It is still there, and can be begun anew.
    assert (tmp_path / "out.npy.partial" / "manifest.json").exists()
    done = transform_file(SCALER, path, out, batch_rows=100, overwrite=True)
    assert done.resumed == 0
    assert not (tmp_path / "out.npy.partial").exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    path = source(tmp_path, "npy")
    work = tmp_path / "out.npy.partial"
    work.mkdir()
    (work / "thesis.tex").write_text("years")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="is in the way, and no interrupted transform"):
            transform_file(SCALER, path, tmp_path / "out.npy", **options)  # type: ignore[arg-type]
    (work / "manifest.json").write_text(json.dumps({"format": "batchnorm.transform", "version": 99}))
    with pytest.raises(InputError, match="is in the way"):
        transform_file(SCALER, path, tmp_path / "out.npy", overwrite=True)
    assert (work / "thesis.tex").read_text() == "years"


def test_resuming_nothing_is_beginning(tmp_path: Path) -> None:
    path = source(tmp_path, "npy")
    (tmp_path / "out.npy.partial").mkdir()  # killed in the first millisecond
    assert transform_file(SCALER, path, tmp_path / "out.npy", resume=True).resumed == 0
