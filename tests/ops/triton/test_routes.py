"""Who gets a CUDA tensor, what is told where it is not the kernels, and what importing costs: nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from batchnorm import _gpu
from batchnorm.ops import native
from batchnorm.ops.schema import SCHEMAS
from batchnorm.ops.triton.registration import MODULES, ROUTES


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What has been tried and told is forgotten before and after a test."""
    for _ in range(2):
        _gpu._told_once.cache_clear()
        _gpu._tried.clear()
        _gpu._failures.clear()
        if _ == 0:
            yield


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an NVIDIA GPU whose torch and Triton are in order."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name)
    for switch in (_gpu.SWITCH, _gpu.NATIVE_SWITCH):
        monkeypatch.delenv(switch, raising=False)


def test_every_operator_has_a_route_and_a_kernel() -> None:
    assert set(ROUTES) == set(MODULES) == set(SCHEMAS)


@pytest.mark.usefixtures("nvidia")
def test_the_status_tells_what_serves_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    status = native.status()
    assert (status.cuda, status.cuda_reason, status.cuda_operators) == ("triton", "", tuple(SCHEMAS))
    for name in (_gpu.SWITCH, _gpu.NATIVE_SWITCH):
        with monkeypatch.context() as context:
            context.setenv(name, "0")
            assert native.status().cuda == "reference"
            assert native.status().cuda_reason == f"switched off by {name}=0"
            assert native.status().cuda_operators == ()
    with monkeypatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: False)
        assert native.status().cuda_reason == "no NVIDIA GPU here"
    with monkeypatch.context() as context:
        context.setattr(importlib.util, "find_spec", lambda *_: None)
        assert native.status().cuda_reason == "Triton is not installed; install batchnorm[gpu]"
    with monkeypatch.context() as context:
        context.setattr(torch.version, "cuda", None)
        assert native.status().cuda_reason.startswith("this build of torch is for ")


@pytest.mark.usefixtures("nvidia")
def test_a_missing_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    x = torch.randn(4, 3)
    text = "batchnorm runs on its slower reference implementation on the GPU: Triton is not installed"
    with pytest.warns(RuntimeWarning, match=text):
        count, *_ = ROUTES["stats"](x, None)
    assert count == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ROUTES["stats"](x, None)


@pytest.mark.usefixtures("nvidia")
def test_who_switches_it_off_is_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_gpu.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ROUTES["stats"](torch.randn(4, 3), None)[0] == 4


@pytest.mark.usefixtures("nvidia")
def test_a_card_on_which_triton_fails_gets_the_reference_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError(f"no compiler for {name}\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="on the GPU: Triton's kernels fail on a card: OSError: no compiler for "):
        assert _gpu.why_not_on(0)
    assert native.status().cuda == "reference"
    assert (
        native.status().cuda_reason == "Triton's kernels fail on a card: OSError: no compiler for batchnorm._gpu_probe"
    )


@pytest.mark.usefixtures("nvidia")
def test_a_card_whose_results_differ_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Module:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, *device: torch.device) -> None:
            # While a card is tried the reference serves it, which the trial calls.
            seen.append((self.name, *device, _gpu.why_not_on(1)))
            if device:
                raise RuntimeError("a training step differs by 3 of the largest value in dx")

    monkeypatch.setattr(importlib, "import_module", Module)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with pytest.warns(
        RuntimeWarning, match="fail on a card: RuntimeError: a training step differs by 3 of the largest"
    ):
        assert _gpu.why_not_on(1)
    trying = "its kernels are being tried"
    trial = ("batchnorm.ops.triton.trial", torch.device("cuda", 1), trying)
    assert seen == [("batchnorm._gpu_probe", trying), trial]
    assert native.status().cuda == "reference"


@pytest.mark.usefixtures("nvidia")
def test_an_old_card_gets_the_reference_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.warns(RuntimeWarning, match="a card has compute capability 7.5, the kernels need 8.0"):
        assert _gpu.why_not_on(0)


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("x", [torch.randn(4, 3, dtype=torch.float64), torch.randn(0, 3)], ids=["float64", "nothing"])
def test_what_the_kernels_do_not_take_goes_to_the_reference(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "why_not_on", lambda _: pytest.fail("a kernel was wanted"))
    assert ROUTES["stats"](x, None)[0] == len(x)
    zero = torch.zeros(3, dtype=torch.float64)
    saved = (zero, zero + 1, None, None, None, None, None, "none")
    assert ROUTES["grad_sums"](x, x, *saved)[0].shape == (3,)


def run_python(code: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_where_torch_is_built_for_cuda_the_operators_are_registered_and_triton_is_not_imported() -> None:
    code = """
import sys, torch
torch.version.cuda = "13.0"
import batchnorm as bn
from batchnorm.ops.schema import SCHEMAS
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(all(has(f"batchnorm::{name}", "CUDA") for name in SCHEMAS), "triton" in sys.modules, torch.cuda.is_initialized())
y = bn.nn.BatchNorm1d(3)(torch.randn(8, 3))  # and the CPU is served as before
print(bn.ops.native.status().active, tuple(y.shape))
"""
    first, second = run_python(code).splitlines()
    assert first == "True False False"
    assert second == f"{native.status().active} (8, 3)"
