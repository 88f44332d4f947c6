"""Loads the C++ library and answers which implementation runs on the CPU and, if it is not the fast one, why."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import warnings
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from batchnorm.ops import registration as registration  # the operators come first, their kernels after
from batchnorm.ops.schema import NAMESPACE, SCHEMAS

SWITCH = "BATCHNORM_NATIVE"
"""Environment variable: ``0`` leaves the library unloaded, to compare with the reference or to find a fault."""


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
    if os.environ.get(SWITCH) == "0":
        return Status("reference", f"switched off by {SWITCH}=0", None, ())
    spec = importlib.util.find_spec("batchnorm._C")
    if spec is None or spec.origin is None:
        return _missing(_why_not_built())
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        return _missing(f"{Path(spec.origin).name} does not load: {_first_line(error)}")
    return Status("native", "", spec.origin, _operators())


def _missing(reason: str) -> Status:
    # Never in silence: the results are the same, the speed is not.
    warnings.warn(f"batchnorm runs on its slower reference implementation: {reason}", RuntimeWarning, stacklevel=2)
    return Status("reference", reason, None, ())


def _operators() -> tuple[str, ...]:
    return tuple(
        name for name in SCHEMAS if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    )


def _why_not_built() -> str:
    # The build leaves a note when it could not compile the library.
    note = resources.files("batchnorm").joinpath("_native_build.txt")
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return "the C++ library is not built; install a C++ compiler and reinstall with --no-build-isolation"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
