"""The instruction sets that the kernels of moments are tested with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from batchnorm._library import load

SETS = torch.ops.batchnorm._instruction_sets().split() if load().path else ["none"]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, kernel: None) -> Iterator[str]:  # noqa: ARG001
    """Each set of this processor in turn."""
    before = torch.ops.batchnorm._instruction_set("")
    assert torch.ops.batchnorm._instruction_set(request.param) == request.param
    yield request.param
    torch.ops.batchnorm._instruction_set(before)
