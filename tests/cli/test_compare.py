"""``batchnorm compare``: files of every kind, models of a user's own, going on, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.commandline import Outcome

pytest.importorskip("plotly")
pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

Call = Callable[..., Outcome]
NAME = "own_network"
NET = """
import torch
from torch import nn

def make(norm):
    return nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))

def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def loaders():
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 4) + y[:, None]
    parts = (slice(0, 100), slice(100, 150), slice(150, 200))
    return [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[p], y[p]), batch_size=10, shuffle=not p.start)
        for p in parts
    ]
"""
QUICK = ("--steps", "8", "--lr", "0.05", "--seeds", "2", "--batch-size", "16", "--device", "cpu")


def frame(rows: int = 200) -> object:
    rng = np.random.default_rng(0)
    kind = np.arange(rows) % 3
    found = pd.DataFrame(rng.normal(0, 1, (rows, 4)) + kind[:, None], columns=list("abcd"))
    found["kind"], found["name"], found["price"] = np.array(["x", "y", "z"])[kind], "text", found.a * 3 + 0.5
    return found


def test_a_table_with_classes(call: Call, project: Path) -> None:
    frame().to_csv("t.csv", index=False)
    outcome = call("compare", "--data", "t.csv", "--target", "kind", *QUICK, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in Path("run").iterdir()} == {
        "config.toml",
        "records.jsonl",
        "summary.json",
        "report.html",
    }
    assert "- Left out, as they hold no numbers: 'name'." in outcome.out
    assert "kind has 3 different values" in outcome.out
    assert "No model was given: the default MLP" in outcome.out
    assert outcome.out.splitlines()[-1] == f"The page: {project / 'run' / 'report.html'}"
    page = Path("run/report.html").read_text()
    assert "batchnorm compare --data t.csv --target kind --lr 0.05 --seeds 2 --steps 8 --batch-size 16" in page
    # The page is there again from the records.
    Path("run/report.html").unlink()
    assert call("report", "run") == Outcome(0, "run/report.html\n", "")
    assert Path("run/report.html").read_text() == page


@pytest.mark.usefixtures("project")
def test_a_quantity_and_json(call: Call) -> None:
    frame().to_parquet("t.parquet")
    outcome = call("compare", "--data", "t.parquet", "--target", "price", "--columns", "b,c,d", *QUICK, "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["config"]["task"] == "regression"
    assert document["config"]["metric"] == "r2"
    assert document["complete"] is True
    assert [item["variant"] for item in document["verdict"]["judgements"]] == ["batch"]
    assert document["rates"] == {"none": 0.05, "batch": 0.05}
    assert Path(document["page"]).parent.parent == Path("runs")


@pytest.mark.usefixtures("project")
def test_images_in_folders(call: Call) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number in range(120):
        folder = Path("photos") / ("day", "night")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 120, (8 + number % 3, 8)) + 100 * (number % 2 == 0)
        image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    outcome = call("compare", "--data", "photos/", "--variants", "none,group=8,batch", *QUICK, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "120 images of 2 classes ('day', 'night'), grey, of 3 sizes, all brought to 8 x 8" in outcome.out
    assert "the default convnet" in outcome.out


@pytest.mark.usefixtures("project")
def test_sequences_with_lengths(call: Call) -> None:
    rng = np.random.default_rng(0)
    lengths, word = rng.integers(3, 12, 150), np.arange(150) % 2
    x = rng.normal(0, 1, (150, 2, 11)) + word[:, None, None]
    x[np.arange(11) >= lengths[:, None, None] * np.ones((1, 2, 1))] = 1e6  # padding that must not count
    np.savez("s.npz", x=x, word=word, length=lengths)
    arguments = ("--data", "s.npz", "--target", "word", "--lengths", "length", "--variants", "none,batch,layer")
    outcome = call("compare", *arguments, *QUICK, "--json", "--out", "run")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert any("padding" in note for note in document["config"]["notes"])
    values = [row[4] for row in document["summary"]["sections"][0]["tables"][1]["rows"]]
    assert min(values) > 0.5


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("model", ["make", "plain"])
def test_a_model_and_loaders_of_a_users_own(call: Call, model: str) -> None:
    arguments = ("--model", f"{NAME}:{model}", "--data", f"{NAME}:loaders", "--optimizer", "adam", "--seed", "3")
    outcome = call("compare", *arguments, *QUICK, "--out", "run", "--tensorboard", "--amp", "bf16")
    assert outcome.code == 0, outcome.err
    assert list(Path("run/tensorboard").iterdir())
    assert {line["seed"] for line in _lines(Path("run")) if line["section"] == "measure"} == {3, 4}


@pytest.mark.usefixtures("project")
def test_workers_load_what_they_need_themselves(call: Call) -> None:
    arguments = ("--model", f"{NAME}.py:make", "--data", f"{NAME}.py:loaders", "--workers", "2")
    outcome = call("compare", *arguments, *QUICK, "--out", "run")
    assert outcome.code == 0, outcome.err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.usefixtures("project")
def test_killed_it_goes_on_and_ends_the_same(call: Call) -> None:
    arguments = ["--model", f"{NAME}:make", "--data", f"{NAME}:loaders", "--lr", "0.01,0.1", "--seeds", "2"]
    arguments += ["--device", "cpu", "--steps", "400"]
    command = [sys.executable, "-m", "batchnorm", "compare", *arguments, "--out", "killed"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 100
        while time.monotonic() < end and process.poll() is None and _finished(Path("killed")) < 3:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert _finished(Path("killed")) >= 3
    assert call("report", "killed").code == 0
    assert "not finished" in Path("killed/report.html").read_text()
    outcome = call("compare", "--resume", "--out", "killed")
    assert outcome.code == 0, outcome.err
    assert "going on: " in outcome.out
    call("compare", *arguments, "--out", "whole")
    assert _records(Path("killed")) == _records(Path("whole"))


def _finished(folder: Path) -> int:
    file = folder / "records.jsonl"
    return file.read_text().count('"finished"') if file.exists() else 0


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def _records(folder: Path) -> list[dict[str, Any]]:
    own = ("search", "measure")
    return [line for line in _lines(folder) if line["section"] in own and line["metric"] != "seconds"]


@pytest.mark.usefixtures("project")
def test_what_is_refused(call: Call) -> None:
    frame().to_csv("t.csv", index=False)
    frame(30).to_csv("few.csv", index=False)
    cases = {
        ("--data", "t.csv"): "t.csv: expected target= (--target), one of its columns",
        ("--data", "t.csv", "--target", "kin"): "t.csv: no column 'kin', did you mean 'kind'?",
        ("--data", "few.csv", "--target", "kind"): "few.csv: expected 20 test samples or more, got 6",
        ("--data", "none.csv", "--target", "kind"): "no such file or folder: 'none.csv'",
        (
            "--data",
            "t.csv",
            "--target",
            "kind",
            "--variants",
            "none,batsh",
        ): "unknown variant 'batsh', did you mean 'batch'",
        ("--data", "t.csv", "--target", "kind", "--model", f"{NAME}:mak"): f"{NAME} has no 'mak', did you mean 'make'?",
        ("--data", "t.csv", "--target", "kind", "--model", f"{NAME}:make"): "make with none does not run",
        (
            "--data",
            "t.csv",
            "--target",
            "kind",
            "--columns",
            "a,b,c,d",
            "--model",
            f"{NAME}:make",
        ): "expected the model to",
        ("--data", f"{NAME}:loaders", "--target", "kind"): "--target is for files",
        ("--data", f"{NAME}:make"): f"{NAME}:make fails on these data: TypeError",
        ("--data", "t.csv", "--target", "kind", "--metric", "f1"): "expected metric to be one of accuracy",
    }
    for arguments, words in cases.items():
        outcome = call("compare", *arguments, *QUICK, "--out", "refused")
        assert (outcome.code, outcome.err.count("\n")) == (1, 1), (arguments, outcome.err)
        assert outcome.err.startswith(f"batchnorm: {words}"), (arguments, outcome.err)
        assert not Path("refused").exists()
    assert "no column" not in call("compare", "--resume").err
    assert call("compare").code == 2
    assert call("compare", "--data", "t.csv", "--lr", "fast").code == 2
