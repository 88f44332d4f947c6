"""The smallest kernel: tells whether Triton can compile and launch here. Imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _one(to):
    tl.store(to, 1.0)


def run() -> None:
    """Compile, launch and wait; raises what Triton raises, or RuntimeError for a wrong value."""
    value = torch.zeros(1, device="cuda")
    _one[(1,)](value)
    if value.item() != 1:
        raise RuntimeError("a kernel ran and wrote nothing")
