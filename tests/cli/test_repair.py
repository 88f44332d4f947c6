"""``batchnorm recalibrate`` and ``batchnorm fold`` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from cli.commandline import Outcome

Call = Callable[..., Outcome]

NAME = "repaired"
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.late = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        with torch.no_grad():
            for norm in (self.norm, self.late):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                norm.weight.uniform_(0.5, 2)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return self.head(self.late(y).relu().mean((2, 3)))
"""


@pytest.fixture(autouse=True)
def files(project: Path) -> None:
    """Beside the model, its weights and data."""
    torch.save({"model": net().state_dict(), "step": 12}, project / "net.pt")
    np.save(project / "x.npy", np.random.default_rng(0).normal(2, 3, (50, 3, 6, 6)).astype("float32"))


def net() -> Any:
    import repaired  # type: ignore[import-not-found]

    return repaired.Net().eval()


RECALIBRATE = ("recalibrate", "repaired:Net", "--checkpoint", "net.pt", "--data", "x.npy", "--batch-size", "16")


def test_a_checkpoint_gets_the_statistics_of_the_data(call: Call) -> None:
    done = call(*RECALIBRATE, "--out", "new.pt")
    assert (done.code, done.err) == (0, ""), done.err
    new = torch.load("new.pt", weights_only=True)
    assert new["step"] == 12
    outputs = net().conv(torch.from_numpy(np.load("x.npy"))).double().transpose(0, 1).flatten(1)
    # Batches of 16, 16, 16 and 2 count by their samples.
    assert torch.allclose(new["model"]["norm.running_mean"].double(), outputs.mean(1), rtol=1e-6)
    assert torch.allclose(new["model"]["norm.running_var"].double(), outputs.var(1), rtol=1e-6)
    assert torch.equal(new["model"]["conv.weight"], net().conv.weight)
    assert "norm" in done.out
    assert done.out.rstrip().endswith(str(Path("new.pt").resolve()))


def test_recalibrate_as_json(call: Call) -> None:
    document = json.loads(call(*RECALIBRATE, "--num-batches", "2", "--out", "new.safetensors", "--json").out or "{}")
    assert document == {}  # a .pt file with a step in it does not fit into safetensors
    torch.save(net().state_dict(), "net.pt")
    document = json.loads(call(*RECALIBRATE, "--num-batches", "2", "--out", "new.safetensors", "--json").out)
    assert document["batches"] == 2
    assert {"norm", "late"} <= {change["layer"] for change in document["changes"]}
    assert Path("new.safetensors").is_file()


def test_recalibrate_until_converged_and_one_layer_after_the_other(call: Call) -> None:
    np.save("x.npy", np.random.default_rng(0).normal(2, 3, (1600, 3, 6, 6)).astype("float32"))
    done = call(*RECALIBRATE, "--until", "0.2", "--out", "new.pt", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["batches"] in (8, 16, 32, 64)
    assert "converged to" in json.loads(done.out)["changes"][0]["what"]
    assert call(*RECALIBRATE, "--until", "0", "--out", "no.pt").code == 2

    done = call(*RECALIBRATE, "--method", "sequential", "--out", "exact.pt")
    assert done.code == 0, done.err
    model, x = net(), torch.from_numpy(np.load("x.npy"))
    model.load_state_dict(torch.load("exact.pt", weights_only=True)["model"])
    seen = model.norm(model.conv(x)).relu().double().transpose(0, 1).flatten(1)
    assert torch.allclose(model.late.running_var.double(), seen.var(1), rtol=1e-5)


def test_recalibrate_replaces_nothing_unasked(call: Call) -> None:
    before = Path("net.pt").read_bytes()
    done = call(*RECALIBRATE, "--out", "net.pt")
    assert (done.code, done.err) == (
        1,
        "batchnorm: net.pt exists already: name another file, or replace it with --force\n",
    )
    assert Path("net.pt").read_bytes() == before
    assert call(*RECALIBRATE, "--out", "net.pt", "--force").code == 0
    assert Path("net.pt").read_bytes() != before
    assert sorted(path.name for path in Path().iterdir() if not path.name.startswith("__")) == [
        *("net.pt", "repaired.py", "x.npy"),
    ]


def test_recalibrate_says_what_is_wrong_in_one_line(call: Call) -> None:
    assert call(*RECALIBRATE[:4], "--out", "new.pt").code == 2
    np.save("x.npy", np.zeros((4, 5, 6, 6), "float32"))
    done = call(*RECALIBRATE, "--out", "new.pt")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert done.err.startswith("batchnorm: ")
    assert not Path("new.pt").exists()


FOLD = ("fold", "repaired:Net", "--checkpoint", "net.pt", "--example-shape", "2,3,6,6")


def reference() -> tuple[Any, Any]:
    model, x = net(), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        return x, model(x)


def test_fold_into_weights(call: Call) -> None:
    done = call(*FOLD, "--out", "folded.safetensors")
    assert (done.code, done.err) == (0, ""), done.err
    assert "norm" in done.out
    assert "late" in done.out  # which was left, and why
    from safetensors.torch import load_file

    folded = bn.fold(net(), torch.randn(2, 3, 6, 6))
    nn.init.zeros_(folded.conv.weight)
    folded.load_state_dict(load_file("folded.safetensors"))
    x, expected = reference()
    assert torch.allclose(folded(x), expected, atol=1e-5)


def test_fold_into_a_program(call: Call) -> None:
    done = call(*FOLD, "--out", "folded.pt2", "--json")
    assert done.code == 0, done.err
    assert "norm" in {change["layer"] for change in json.loads(done.out)["changes"]}
    x, expected = reference()
    assert torch.allclose(torch.export.load("folded.pt2").module()(x), expected, atol=1e-5)


def test_fold_into_onnx(call: Call) -> None:
    runtime = pytest.importorskip("onnxruntime")
    done = call(*FOLD, "--out", "folded.onnx")
    assert (done.code, done.err) == (0, "")
    x, expected = reference()
    session = runtime.InferenceSession("folded.onnx", providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(result, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*FOLD[:4], "--out", "a.pt"), 2, "expected an example: either --data or --example-shape"),
        ((*FOLD, "--data", "x.npy", "--out", "a.pt"), 2, "expected an example: either --data or --example-shape"),
        (
            (*FOLD, "--out", "a.txt"),
            2,
            "ends in .safetensors, .pt, .pth, .pt2, .onnx, got 'a.txt'",
        ),
        ((*FOLD, "--out", "no/a.pt"), 1, "there is no folder no"),
        ((*FOLD, "--strict", "--out", "a.pt"), 1, "late"),
        ((*FOLD[:4], "--example-shape", "2,5,6,6", "--out", "a.pt"), 1, "batchnorm: "),
    ],
)
def test_fold_says_what_is_wrong_in_one_line(arguments: tuple[str, ...], code: int, message: str, call: Call) -> None:
    done = call(*arguments)
    assert done.code == code
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(Path().glob("*a.*"))
