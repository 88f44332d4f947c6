"""What all tests share: one thread each (they run side by side), the same seed, and notices about what was left out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from batchnorm._library import has_kernel, load
from batchnorm.ops import native
from batchnorm.ops.native import Status
from batchnorm.ops.schema import SCHEMAS

torch.set_num_threads(1)

# The same examples every time: a change is judged by what it changes. BATCHNORM_EXPLORE=1 draws new ones.
settings.register_profile("here", derandomize=os.environ.get("BATCHNORM_EXPLORE") != "1", deadline=None)
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers for a test whatever ran before it, and the state put back after it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def promised_native() -> bool:
    """Whether this machine has promised a C++ library (then its absence is a failure)."""
    return os.environ.get("BATCHNORM_REQUIRE_NATIVE") == "1"


@pytest.fixture
def kernel(request: pytest.FixtureRequest, promised_native: bool) -> None:
    """The kernel of the module's OPERATOR is what runs; its absence fails where it was promised."""
    name = request.module.OPERATOR
    if not has_kernel(name) and not promised_native:
        pytest.skip(f"no C++ library here: {load().reason}")
    assert has_kernel(name), load().reason


@pytest.fixture
def gpu() -> str:
    """The device of tests marked ``cuda``; its absence fails where it was promised (BATCHNORM_REQUIRE_CUDA=1)."""
    if not torch.cuda.is_available() and os.environ.get("BATCHNORM_REQUIRE_CUDA") != "1":
        pytest.skip("no NVIDIA GPU here")
    assert torch.cuda.is_available()
    return "cuda"


@pytest.fixture
def library(promised_native: bool) -> Status:
    """The loaded C++ library with a kernel for every operator; its absence fails where it was promised."""
    status = native.status()
    if status.active != "native" and not promised_native:
        pytest.skip(f"no C++ library here: {status.reason}")
    assert status.active == "native", status.reason
    assert set(status.operators) == set(SCHEMAS)
    return status
