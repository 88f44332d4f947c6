"""What the benchmarks share: interleaved timing, the machine's description, results as files and tables.

Candidates are timed in turn, round by round, in one process: whatever else the machine does hits all of them alike, and
the ratio of two medians is worth something where the times themselves are not.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import batchnorm

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over rounds and the quartiles."""

    median: float
    low: float
    high: float


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 15, least: float = 0.02
) -> dict[str, Timing]:
    """Time each candidate once a round, in turn; a measurement repeats the call until it lasts ``least`` seconds."""
    repeats = {}
    for name, call in candidates.items():
        call()  # warm: first calls allocate, compile, load
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, int(least / max(time.perf_counter() - began, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - began) / repeats[name])
    return {
        name: Timing(statistics.median(values), *statistics.quantiles(values, n=4)[::2])
        for name, values in times.items()
    }


def machine() -> dict[str, Any]:
    """What a number must not be quoted without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    status = batchnorm.ops.native.status()
    return {
        "cpu": cpu,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batchnorm": batchnorm.__version__,
        "implementation": status.active if status.active == "native" else f"{status.active}: {status.reason}",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def save(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the rows with the machine beside them, to be committed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()])
    Console(width=160).print(table)
