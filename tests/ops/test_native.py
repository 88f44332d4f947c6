"""The C++ library: that it is the one that runs, that it agrees with the reference, and what happens without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from batchnorm.ops import reference

LAYOUTS = {
    "(N, C)": lambda x: x[:, :, 0, 0],
    "(N, C, L)": lambda x: x[:, :, 0],
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(0, 1, 3, 2),
    "sliced": lambda x: x[:, ::2, :, 1:],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "reversed order": lambda x: x.permute(3, 2, 1, 0),
    "no rows": lambda x: x[:0],
    "no channels": lambda x: x[:, :0],
    "no positions": lambda x: x[:, :, :0],
}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_stats_equal_the_reference(layout, masked, dtype):
    x = layout((torch.randn(5, 7, 4, 3, dtype=torch.float64) * 3 + 10).to(dtype))
    mask = torch.rand(x.size(0), *x.shape[2:]) > 0.4 if masked else None
    for ours, expected in zip(torch.ops.batchnorm.stats(x, mask), reference.stats(x, mask), strict=True):
        assert ours.dtype == torch.float64
        bound = 1e-6 if dtype.itemsize == 2 else 1e-13  # of 16 bits, a few are added in float32 first
        torch.testing.assert_close(ours, expected, rtol=bound, atol=bound)


@pytest.mark.usefixtures("library")
def test_stats_do_not_depend_on_the_number_of_threads():
    x = torch.randn(64, 33, 40)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.batchnorm.stats(x, None))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("library")
def test_a_mask_of_the_wrong_size_is_refused():
    with pytest.raises(RuntimeError, match="boolean mask of shape"):
        torch.ops.batchnorm.stats(torch.randn(4, 3, 5), torch.ones(4, 4, dtype=torch.bool))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_switched_off_it_runs_on_the_reference():
    code = """
import torch, batchnorm as bn
status = bn.ops.native.status()
assert (status.active, status.library, status.operators) == ("reference", None, ()), status
assert status.reason == "switched off by BATCHNORM_NATIVE=0", status.reason
x = torch.randn(8, 3, 4, requires_grad=True)
bn.nn.BatchNorm1d(3, activation="relu")(x).sum().backward()
assert x.grad.isfinite().all()
"""
    finished = run_python(code, BATCHNORM_NATIVE="0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # who switched it off needs no warning


def test_without_the_library_it_works_and_says_so():
    code = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "batchnorm._C" else find(name, *rest)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, batchnorm as bn
    y = bn.nn.BatchNorm1d(3)(torch.randn(8, 3))
[warning] = [w for w in caught if "batchnorm" in str(w.message)]
print(warning.category.__name__, warning.message)
print(bn.ops.native.status())
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
    assert "RuntimeWarning batchnorm runs on its slower reference implementation: the C++ library" in finished.stdout
    assert "active='reference'" in finished.stdout


def test_a_library_that_does_not_load_is_named(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    code = f"""
import importlib.util, types, warnings
find = importlib.util.find_spec
fake = types.SimpleNamespace(origin={str(broken)!r})
importlib.util.find_spec = lambda name, *rest: fake if name == "batchnorm._C" else find(name, *rest)
warnings.simplefilter("ignore")
import batchnorm as bn
print(bn.ops.native.status().reason)
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("_C.abi3.so does not load: ")
