"""Steps of our layers beside torch's, oneDNN's and the floor: medians and ratios of one interleaved run.

Each group of cases runs in a process of its own, twice: with malloc as it comes, where a large output is fresh memory
whose pages fault on first use, and on a warm heap, where malloc is told to keep what it has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks import onednn
from benchmarks.harness import options, save, show
from benchmarks.layers.cases import CONTIGUOUS, LAST
from benchmarks.layers.targets import DEFAULT, WARM, Row, ratio, targets

MALLOC = {
    DEFAULT: {},
    # All of it from malloc's own heap, which is never given back. (A high MALLOC_MMAP_THRESHOLD_ would not do: the C
    # library ignores values above 32 MB, and larger tensors would be fresh pages each time.)
    WARM: {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)},
}
GROUPS = {DEFAULT: (CONTIGUOUS, LAST, "others"), WARM: (CONTIGUOUS, LAST, "others", "sweep", "compiled")}
PEERS = ("torch", "torch in place", "oneDNN nhwc", "oneDNN blocked", "floor", "torch compiled", "ours compiled")
USUAL = ("float32", "training")
QUICK_GROUPS = {DEFAULT: (CONTIGUOUS, LAST), WARM: (CONTIGUOUS, LAST, "others", "sweep")}


def measure(group: str, regime: str) -> tuple[list[Row], dict[str, Any]]:
    """A group's rows, and the versions of its peers."""
    command = [*options.under, sys.executable, "-W", "ignore", "-m", "benchmarks.layers.run", group]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    finished = subprocess.run(
        [*command, "--quick"] if options.quick else command,
        env={**environment, **MALLOC[regime]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    rows = [{"regime": regime, **line} for line in lines if "shape" in line]
    return rows, next((line for line in lines if "shape" not in line), {})


def main() -> None:
    began = time.monotonic()
    rows: list[Row] = []
    versions: dict[str, Any] = {"oneDNN": onednn.missing()}
    for regime in (WARM, DEFAULT):
        for group in (QUICK_GROUPS if options.quick else GROUPS)[regime]:
            measured, peers = measure(group, regime)
            rows += measured
            versions |= peers
            print(f"{regime}, {group}: {len(measured)} cases, {time.monotonic() - began:.0f} s so far", flush=True)
    for regime in (WARM, DEFAULT):
        for title, wanted in (("conv shapes", True), ("other shapes", False)):
            of_part = [row for row in rows if row["regime"] == regime and (row["part"] == "conv") == wanted]
            shown = [line(row) for row in of_part if row["part"] != "sweep"]
            if shown:
                show(f"{regime}, {title}: our step in ms, and theirs as multiples of it", shown)
    swept = sorted((row for row in rows if row["part"] == "sweep"), key=lambda row: ratio(row) or 0)
    if swept:
        show(f"the slowest against torch of {len(swept)} random shapes", [line(row) for row in swept[:8]])
    reached = targets(rows)
    show("targets, by the worst case", reached)
    path = save("layers", rows, versions=versions, targets=reached)
    print(f"{time.monotonic() - began:.0f} s" + (f", saved as {path}" if path else ""))


def line(row: Row) -> dict[str, Any]:
    """A row as the tables show it."""
    seconds = row["seconds"]
    shown: dict[str, Any] = {
        "shape": row["shape"],
        "layout": row["layout"],
        "layer": ", ".join([row["layer"], *(word for word in (row["dtype"], row["mode"]) if word not in USUAL)]),
        "ours ms": 1e3 * seconds["ours"]["median"],
    }
    for peer in PEERS:
        value = ratio(row, peer)
        shown[peer] = row["missing"].get(peer, "") if value is None else value
    return shown


if __name__ == "__main__":
    main()
