"""The layers where there is no C++ library, and no float64 as on MPS: the reference, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def run(*command: str) -> None:
    """Run Python without the C++ library."""
    environment = os.environ | {"BATCHNORM_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=TESTS
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_battery_without_the_library():
    chosen = "(test_dtypes or test_memory_formats or masked or test_empty_batch) and not compiles"
    root = TESTS.parent
    run(
        "-m",
        "pytest",
        "--rootdir",
        str(root),
        "-c",
        str(root / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(TESTS / "conformance" / "test_layers.py"),
        "-k",
        chosen,
    )


WITHOUT_FLOAT64 = """
import copy, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
sys.path.insert(0, ".")
from conformance.cases import CASES
from conformance.test_layers import made

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            assert not isinstance(each, torch.Tensor) or each.dtype != torch.float64, function
        return out

torch.manual_seed(0)
expected = {}
for name, case in CASES.items():
    for training in (True, False):
        layer, x = made(case, training), torch.randn(case.shape)
        before, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        y = layer(leaf)
        y.pow(3).sum().backward()
        expected[name, training] = before, x, y.detach(), leaf.grad, layer.state_dict()
for name, module in list(sys.modules.items()):
    if name.startswith("batchnorm") and hasattr(module, "statistics_dtype"):
        module.statistics_dtype = lambda device: torch.float32
for (name, training), (layer, x, y, dx, state) in expected.items():
    leaf = x.clone().requires_grad_()
    with NoFloat64():
        found = layer(leaf)
        found.pow(3).sum().backward()
    for ours, theirs in ((found.detach(), y), (leaf.grad, dx), (layer.state_dict(), state)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=lambda text: f"{name} {training}: {text}")
"""


def test_a_device_without_float64():
    run("-c", WITHOUT_FLOAT64)
