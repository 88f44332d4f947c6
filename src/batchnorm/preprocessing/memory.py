"""How much memory there is, asked before a matrix of features x features is made."""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm._errors import InputError

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that can still be had without swapping: the system's, or what is left of a container's limit.

    Where the system names no such number, half of the physical memory; None where it names neither.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        system = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, ValueError, OSError):
            return None
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        # The cache of files counts as used, but is given up when memory is wanted.
        cache = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        return system if limit == "max" else max(0, min(system, int(limit) - int(used) + int(cache)))
    except (OSError, KeyError, ValueError):
        return system


def refuse_beyond_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Raise an InputError, one line, where ``num_bytes`` are more than the memory available."""
    available = available_memory()
    if available is not None and num_bytes > available:
        raise InputError(
            f"{what} needs {num_bytes / 1e9:.3g} GB of memory, and {available / 1e9:.3g} GB are available: {remedy}"
        )
