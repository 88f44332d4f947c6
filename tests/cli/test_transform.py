from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.preprocessing import StandardScaler, Whitener, load
from cli.commandline import Outcome

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

pytestmark = pytest.mark.usefixtures("folder")

Call = Callable[..., Outcome]
X = np.random.default_rng(0).normal(50, 3, (300, 3))
NAMES = ["a", "b", "c"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    frame = pd.DataFrame(X, columns=NAMES)
    StandardScaler().fit(X).save("s.safetensors")
    StandardScaler().fit(frame).save("named.safetensors")
    frame["label"] = "l"
    frame.to_parquet("x.parquet")
    Path("parts").mkdir()
    for number, part in enumerate((frame[:100], frame[100:])):
        part.to_csv(f"parts/{number}.csv", index=False)
    return tmp_path


def test_a_file_becomes_a_file(call: Call) -> None:
    outcome = call("transform", "x.npy", "--stats", "s.safetensors", "--out", "y.npy")
    assert (outcome.code, outcome.err) == (0, "")
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["rows", "time", "written"]
    np.testing.assert_array_equal(np.load("y.npy"), StandardScaler().fit_transform(X))
    outcome = call(
        "transform", "y.npy", "--stats", "s.safetensors", "--inverse", "--out", "z.npy", "--dtype", "float32", "--json"
    )
    document = json.loads(outcome.out)
    assert {name: document[name] for name in ("out", "files", "rows", "resumed")} == {
        "out": "z.npy",
        "files": 1,
        "rows": 300,
        "resumed": 0,
    }
    np.testing.assert_array_equal(np.load("z.npy"), X.astype(np.float32))


def test_tables_and_folders(call: Call) -> None:
    assert call("transform", "x.parquet", "--stats", "named.safetensors", "--out", "y.parquet").code == 0
    assert list(pd.read_parquet("y.parquet").columns) == [*NAMES, "label"]
    arguments = ["transform", "x.parquet", "--stats", "s.safetensors", "--columns", "a,b,c", "--drop-others"]
    assert call(*arguments, "--out", "y.csv").code == 0
    assert list(pd.read_csv("y.csv").columns) == NAMES
    for number, sources in enumerate((["parts"], ["parts/*.csv"], ["parts/0.csv", "parts/1.csv"])):
        outcome = call("transform", *sources, "--stats", "named.safetensors", "--out", f"out{number}/")
        assert "files       2\n" in outcome.out, outcome.err
        found = pd.concat([pd.read_csv(f"out{number}/{name}.csv") for name in (0, 1)])
        np.testing.assert_allclose(found[NAMES], StandardScaler().fit_transform(X), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npy"], "no such file or folder: 'missing.npy'"),
        (["x.npy", "--stats", "x.npy"], "'x.npy' is truncated, damaged or no safetensors file"),
        (["x.npy", "--stats", "gone.safetensors"], "cannot read the statistics file 'gone.safetensors'"),
        (["x.npy", "--stats", "cut.safetensors"], "'cut.safetensors' is truncated, damaged"),
        (["x.npy", "--stats", "flipped.safetensors"], "'flipped.safetensors' is damaged, its contents do not match"),
        (["x.npy", "--stats", "foreign.safetensors"], "'foreign.safetensors' holds no statistics of batchnorm"),
        (
            ["x.npy", "--stats", "wide.safetensors"],
            "x.npy: X has 3 features, but StandardScaler is expecting 5 features",
        ),
        (["x.parquet", "--stats", "other.safetensors"], "x.parquet: no column 'q', a feature of the statistics"),
        (["x.npy", "--out", "x.npy"], "x.npy is the data themselves"),
        (["x.npy", "--out", "s.safetensors"], "s.safetensors exists already"),
        (["x.npy", "--out", "y.xlsx"], "cannot tell by its suffix how to write 'y.xlsx'"),
        (["x.npy", "--out", "no/y.npy"], "cannot write no/y.npy: there is no folder no, create it first"),
        (["parts", "--out", "parts/out"], "the result parts/out would lie among the data in parts"),
        (["infinite.npy"], "infinite.npy: Input X contains infinity: row 7, column 1"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(call: Call, folder: Path, arguments: list[str], message: str) -> None:
    import safetensors.numpy

    data = Path("s.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-9])
    Path("flipped.safetensors").write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    safetensors.numpy.save_file({"x": X}, "foreign.safetensors")
    StandardScaler().fit(np.ones((4, 5))).save("wide.safetensors")
    StandardScaler().fit(pd.DataFrame(X, columns=["a", "q", "c"])).save("other.safetensors")
    bad = X.copy()
    bad[7, 1] = np.inf
    np.save("infinite.npy", bad)
    before = sorted(folder.rglob("*"))
    defaults = [
        word
        for name, word in (("--stats", "s.safetensors"), ("--out", "y.npy"))
        if name not in arguments
        for word in (name, word)
    ]
    outcome = call("transform", *arguments, *defaults)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1, outcome.err
    assert message in outcome.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "--force"], "--resume and --force exclude each other"),
        (["--dtype", "int8"], "'int8' is not one of 'float16', 'float32', 'float64'"),
        (["--batch-rows", "0"], "0 is not in the range x>=1"),
        (["--ray", "local", "--dtype", "float32"], "--ray goes with --columns and --inverse alone"),
    ],
)
def test_wrong_usage(call: Call, arguments: list[str], message: str) -> None:
    outcome = call("transform", "x.npy", "--stats", "s.safetensors", "--out", "y.npy", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(call: Call) -> None:
    Path("locked").mkdir(mode=0o500)
    outcome = call("transform", "x.npy", "--stats", "s.safetensors", "--out", "locked/y.npy")
    assert outcome == Outcome(1, "", "batchnorm: cannot write locked/y.npy: Permission denied\n")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A limit on the size of files stands for a full disk: a write fails in its middle, in whatever library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "csv", "parquet", "arrow", "feather"])
def test_a_full_disk(call: Call, folder: Path, kind: str, request: pytest.FixtureRequest) -> None:
    np.save("long.npy", np.random.default_rng(0).normal(size=(9000, 3)))
    Path(f"y.{kind}").write_text("the old one")
    before = sorted(folder.iterdir())
    request.getfixturevalue("small_disk")
    arguments = ["transform", "long.npy", "--stats", "s.safetensors", "--out", f"y.{kind}", "--batch-rows", "1000"]
    outcome = call(*arguments, "--force")
    assert (outcome.code, outcome.out) == (1, ""), outcome.err
    assert re.fullmatch(rf"batchnorm: cannot write y\.{kind}: .*File too large.*\n", outcome.err)
    assert sorted(folder.iterdir()) == before
    assert Path(f"y.{kind}").read_text() == "the old one"


def test_a_full_disk_while_statistics_are_saved(call: Call, folder: Path, request: pytest.FixtureRequest) -> None:
    np.save("wide.npy", np.random.default_rng(0).normal(size=(10, 9000)))
    before = sorted(folder.iterdir())
    request.getfixturevalue("small_disk")
    outcome = call("fit", "wide.npy", "--out", "wide.safetensors")
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch(r"batchnorm: cannot write the statistics to 'wide\.safetensors': File too large\n", outcome.err)
    assert sorted(folder.iterdir()) == before


def test_ray_gets_what_was_asked_for(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def transform(estimator: Any, source: Any, folder: str, **options: Any) -> None:
        asked.update(options, source=source, folder=folder, mean=estimator.mean_)

    def fit(estimator: Any, source: Any, **options: Any) -> None:
        asked.update(options, source=source)
        estimator.fit(np.load(source[0]))

    fake = types.ModuleType("distributed")
    fake.fit_files_on_ray, fake.transform_files_on_ray = fit, transform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "batchnorm.preprocessing.distributed", fake)
    monkeypatch.setattr("batchnorm.cli.options.quiet_ray", lambda: None)
    arguments = ["transform", "parts", "--stats", "s.safetensors", "--out", "there", "--inverse", "--ray", "auto"]
    assert call(*arguments, "--columns", "a,b,c").code == 0
    np.testing.assert_allclose(asked.pop("mean"), X.mean(0))
    assert asked == {
        "source": ["parts"],
        "folder": "there",
        "columns": ("a", "b", "c"),
        "inverse": True,
        "address": "auto",
    }
    asked.clear()
    # What was known before is not forgotten, though a fit on Ray begins anew.
    outcome = call("fit", "x.npy", "--continue", "s.safetensors", "--out", "t.safetensors", "--ray", "local")
    assert outcome.code == 0, outcome.err
    assert asked == {"source": ["x.npy"], "columns": None, "weights": None, "address": "local"}
    assert load("t.safetensors").n_samples_seen_ == 600


def test_ctrl_c_says_how_to_go_on_and_going_on_is_the_same(call: Call) -> None:
    Whitener("zca").fit(X).save("w.safetensors")
    arguments = ["transform", "x.npy", "--stats", "w.safetensors", "--out", "y.npy", "--batch-rows", "10"]
    slow = "import time; from batchnorm.cli.options import Meter; before = Meter.__call__\n"
    slow += "def call(*a): before(*a); print(flush=True); time.sleep(0.2)\nMeter.__call__ = call"
    code = f"{slow}\nimport sys\nfrom batchnorm.cli import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, error
    said = re.fullmatch(r"batchnorm: interrupted, (\d+) rows are kept; go on with: batchnorm (.*)\n", error)
    assert said, error
    assert said[2].split() == [*arguments, "--resume"]
    outcome = call("transform", "x.npy", "--stats", "w.safetensors", "--out", "y.npy")
    assert f"y.npy.partial holds an interrupted transform, {said[1]} rows of it: go on with it" in outcome.err
    outcome = call(*said[2].split())
    assert f"rows        300, {said[1]} of them before\n" in outcome.out
    call(*arguments[:5], "whole.npy", "--batch-rows", "10")
    assert Path("y.npy").read_bytes() == Path("whole.npy").read_bytes()
