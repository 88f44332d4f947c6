"""Whether the Triton kernels for NVIDIA GPUs run here, and the way to them, for whichever room has some.

Nothing is imported and no device is asked before a tensor on a GPU comes: a process that never has one pays nothing,
and may still fork. Then Triton is imported, one value computed with it, and the rooms' own trials are run
(:func:`try_first`); what fails there is told once, and the reference serves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from batchnorm._library import SWITCH as NATIVE_SWITCH

SWITCH = "BATCHNORM_TRITON"
"""Environment variable: ``0`` leaves the GPU to the reference, to compare with it or to find a fault."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take; float64, which GPUs are slow at, stays with the reference."""

_OLDEST = (8, 0)  # compute capability: what the kernels are compiled for in tests
_trials: list[str] = []  # modules whose run(device) compares a room's kernels with its reference
_tried: set[int] = set()
_failures: dict[int, str] = {}  # by device: why its first value could not be computed


def why_not_built() -> str:
    """Why there can be no kernels in this process, whatever the device; empty where there can."""
    for switch in (NATIVE_SWITCH, SWITCH):
        if os.environ.get(switch) == "0":
            return f"switched off by {switch}=0"
    if torch.version.cuda is None:
        other = "AMD GPUs" if torch.version.hip else "the CPU"
        return f"this build of torch is for {other}, the kernels are for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install batchnorm[gpu]"
    return ""


def why_not() -> str:
    """Why the kernels do not run on GPUs here, as far as is known; empty where they do. Tries nothing."""
    reason = why_not_built()
    if not reason and not torch.cuda.is_available():
        reason = "no NVIDIA GPU here"
    return reason or next(iter(_failures.values()), "")


def try_first(module: str) -> None:
    """Have ``run(device)`` of ``module`` called on each GPU before a kernel is used there; it raises what is wrong."""
    _trials.append(module)


def why_not_on(index: int) -> str:
    """The same for one GPU. Tries it the first time, and warns where it fails."""
    if index not in _tried:
        # Meanwhile the reference serves: the trials call it on this GPU.
        _tried.add(index)
        _failures[index] = "its kernels are being tried"
        reason = _fault(index)
        del _failures[index]
        if reason:
            _failures[index] = reason
            _told(reason)
    return _failures.get(index, "")


def _fault(index: int) -> str:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need {_OLDEST[0]}.{_OLDEST[1]}"
        )
    try:
        probe = importlib.import_module("batchnorm._gpu_probe")
        with torch.cuda.device(index):
            probe.run()
            for trial in _trials:
                importlib.import_module(trial).run(torch.device("cuda", index))
    except Exception as error:  # noqa: BLE001 -- whatever it is, the layers must go on, and it is told
        first = (str(error).splitlines() or [""])[0]
        return f"Triton's kernels fail on {name}: {type(error).__name__}: {first}"
    return ""


def _told(reason: str) -> None:
    # Never in silence: the results are the same, the speed is not.
    text = f"batchnorm runs on its slower reference implementation on the GPU: {reason}"
    warnings.warn(text, RuntimeWarning, stacklevel=4)


@functools.cache
def _told_once(reason: str) -> None:
    if not reason.startswith("switched off"):  # who switched it off needs no warning
        _told(reason)


def routed(
    module: str, name: str, reference: Callable[..., Any], data: int, dtypes: tuple[torch.dtype, ...] | None = DTYPES
) -> Callable[..., Any]:
    """An operator's implementation for CUDA: the function ``name`` of ``module`` where it serves, else the reference.

    ``data`` is the argument that tells: a tensor with elements and of one of ``dtypes`` (None: of any).
    """

    def implementation(*arguments: Any) -> Any:
        tensor = arguments[data]
        if tensor.numel() == 0 or (dtypes is not None and tensor.dtype not in dtypes):
            return reference(*arguments)
        reason = why_not_built()
        if reason:
            _told_once(reason)
            return reference(*arguments)
        if why_not_on(tensor.device.index):
            return reference(*arguments)
        return getattr(importlib.import_module(module), name)(*arguments)

    return implementation


def register(library: Any, name: str, implementation: Callable[..., Any]) -> None:
    """Give an operator that has been defined its implementation for CUDA, where torch has any."""
    if torch.version.cuda is not None:
        library.impl(name, implementation, "CUDA")
