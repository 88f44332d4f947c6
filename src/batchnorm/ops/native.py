"""Answers which implementation runs on the CPU and, if it is not the fast one, why."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from batchnorm._library import SWITCH, has_kernel, load
from batchnorm.ops import registration as registration  # so that the operators can be asked for
from batchnorm.ops.schema import SCHEMAS

__all__ = ["SWITCH", "Status", "status"]


@dataclasses.dataclass(frozen=True)
class Status:
    """What runs on the CPU.

    Attributes:
        active: "native" where the C++ library is loaded, otherwise "reference".
        reason: why it is not; empty where it is.
        library: the loaded file.
        operators: the operators that have a C++ kernel for the CPU; the others run the reference.
    """

    active: Literal["native", "reference"]
    reason: str
    library: str | None
    operators: tuple[str, ...]


@functools.cache
def status() -> Status:
    """Load the library, once a process, and tell. Does not raise: without it everything works on the reference."""
    library = load()
    operators = tuple(name for name in SCHEMAS if has_kernel(name))
    return Status("native" if library.path else "reference", library.reason, library.path, operators)
