"""What the benchmarks share: interleaved timing, the machine's description, results as files and tables.

Candidates are timed in turn, round by round, in one run: whatever else the machine does hits all of them alike, and
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


@dataclasses.dataclass
class Options:
    """What the command line asked for.

    Attributes:
        quick: a subset, in about a minute, for development; its results are not saved.
        under: a command that measuring processes are started under, such as ``taskset -c 0,1``.
    """

    quick: bool = False
    under: tuple[str, ...] = ()


options = Options()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over rounds and the quartiles."""

    median: float
    low: float
    high: float


class Clock:
    """Measures a call: ``seconds(repeats)`` is the time of one, the mean over so many."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def seconds(self, repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            self.call()
        return (time.perf_counter() - began) / repeats


def interleave(
    candidates: Mapping[str, Any], rounds: int = 15, least: float = 0.02, budget: float = float("inf")
) -> dict[str, Timing]:
    """Time each candidate once a round, in turn.

    A candidate is a function, or an object with a ``seconds`` of its own (see :class:`Clock`). A measurement repeats
    the call until it lasts ``least`` seconds; there are five rounds at least, and no more than fit into ``budget``
    seconds.
    """
    clocks = {name: Clock(each) if callable(each) else each for name, each in candidates.items()}
    repeats, expected = {}, 0.0
    for name, clock in clocks.items():
        clock.seconds(2)  # warm: first calls allocate, compile, load
        once = max(clock.seconds(1), 1e-9)
        repeats[name] = max(1, int(least / once))
        expected += once * repeats[name]
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(max(5, int(min(rounds, budget / expected)))):
        for name, clock in clocks.items():
            times[name].append(clock.seconds(repeats[name]))
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


def save(name: str, rows: list[dict[str, Any]], **more: Any) -> Path | None:
    """Write the rows with the machine beside them, to be committed; a quick run leaves them as they are."""
    if options.quick:
        return None
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n")
    return path


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, without the columns in which nothing stands."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    columns = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in columns:
        words = all(isinstance(row[name], str) for row in rows)
        table.add_column(name, justify="left" if words else "right")
    for row in rows:
        values = [row[name] for name in columns]
        table.add_row(*[f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for v in values])
    Console(width=160).print(table)
