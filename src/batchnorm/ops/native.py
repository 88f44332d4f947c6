"""Answers which implementation runs on the CPU and on GPUs and, if it is not the fast one, why."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch

from batchnorm import _gpu
from batchnorm._errors import InputError
from batchnorm._library import SWITCH, has_kernel, load
from batchnorm.ops import registration as registration  # so that the operators can be asked for
from batchnorm.ops.schema import SCHEMAS

__all__ = ["SWITCH", "Status", "kept_memory", "release_memory", "status"]


@dataclasses.dataclass(frozen=True)
class Status:
    """What runs on the CPU, and what on GPUs.

    Attributes:
        active: "native" where the C++ library is loaded, otherwise "reference".
        reason: why it is not; empty where it is.
        library: the loaded file.
        operators: the operators that have a C++ kernel for the CPU; the others run the reference.
        cuda: "triton" where the Triton kernels serve CUDA tensors (of float32, float16 and bfloat16), otherwise
            "reference".
        cuda_reason: why they do not; empty where they do.
        cuda_operators: the operators that have one.
    """

    active: Literal["native", "reference"]
    reason: str
    library: str | None
    operators: tuple[str, ...]
    cuda: Literal["triton", "reference"] = "reference"
    cuda_reason: str = ""
    cuda_operators: tuple[str, ...] = ()


def status() -> Status:
    """Load the library, once a process, and tell. Does not raise: without it everything works on the reference.

    Of GPUs it tells what is known without starting one: a kernel is compiled for the first tensor that needs it, and
    should that fail, a warning says so and this says why from then on.
    """
    library, cuda_reason = load(), _gpu.why_not()
    return Status(
        "native" if library.path else "reference",
        library.reason,
        library.path,
        tuple(name for name in SCHEMAS if has_kernel(name)),
        "reference" if cuda_reason else "triton",
        cuda_reason,
        () if cuda_reason else tuple(SCHEMAS),
    )


def kept_memory() -> int:
    """Bytes of freed outputs that the C++ library keeps for the next ones; 0 without it.

    A large output whose memory malloc has just given back to the system costs a page fault every 4 KB, which takes
    longer than the normalization itself. So the memory of outputs of 128 KB and more is kept when they are freed, up to
    an eighth of the machine's, or ``BATCHNORM_KEEP_MEMORY`` bytes (0 keeps nothing). What has not been wanted for two
    seconds is offered to the system, which takes it when memory runs short.
    """
    return cast(int, torch.ops.batchnorm._kept_memory()) if load().path else 0


def release_memory(keep_at_most: int | None = None) -> None:
    """Give the kept memory back to the system.

    Args:
        keep_at_most: bytes to keep from now on, 0 for none; None leaves the limit as it is.
    """
    if keep_at_most is not None and keep_at_most < 0:
        raise InputError(f"expected keep_at_most as a number of bytes, got {keep_at_most}")
    if load().path:
        torch.ops.batchnorm._release_memory(-1 if keep_at_most is None else keep_at_most)
