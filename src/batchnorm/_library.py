"""Loads the C++ library, for whichever room is used first.

The library registers kernels for operators whose schemas the rooms define; torch's dispatcher takes the two in either
order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import warnings
from importlib import resources
from pathlib import Path

import torch

NAMESPACE = "batchnorm"
"""The library of all operators of the package."""

SWITCH = "BATCHNORM_NATIVE"
"""Environment variable: ``0`` leaves the library unloaded, to compare with the reference or to find a fault."""


@dataclasses.dataclass(frozen=True)
class Library:
    """The loaded file, or None and the reason."""

    path: str | None
    reason: str = ""


@functools.cache
def load() -> Library:
    """Load the library, once a process. Does not raise: without it everything works on the reference."""
    if os.environ.get(SWITCH) == "0":
        return Library(None, f"switched off by {SWITCH}=0")
    spec = importlib.util.find_spec("batchnorm._C")
    if spec is None or spec.origin is None:
        return _missing(_why_not_built())
    try:
        torch.ops.load_library(spec.origin)
    except (OSError, RuntimeError) as error:
        return _missing(f"{Path(spec.origin).name} does not load: {_first_line(error)}")
    return Library(spec.origin)


def has_kernel(operator: str) -> bool:
    """Whether an operator that has been defined runs in C++ on the CPU."""
    return load().path is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", "CPU")


def _missing(reason: str) -> Library:
    # Never in silence: the results are the same, the speed is not.
    warnings.warn(f"batchnorm runs on its slower reference implementation: {reason}", RuntimeWarning, stacklevel=2)
    return Library(None, reason)


def _why_not_built() -> str:
    # The build leaves a note when it could not compile the library.
    note = resources.files("batchnorm").joinpath("_native_build.txt")
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return "the C++ library is not built; install a C++ compiler and reinstall with --no-build-isolation"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
