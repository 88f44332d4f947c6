"""Measures one group of cases and prints a line of JSON for each: ``python -m benchmarks.layers.run GROUP [--quick]``.

A process of its own, because malloc reads its settings once, when a process starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

from benchmarks import onednn
from benchmarks.harness import interleave
from benchmarks.layers.cases import group
from benchmarks.layers.steps import candidates

THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("group")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    drivers = {} if onednn.missing() else {layout: onednn.Driver() for layout in ("nhwc", "blocked")}
    small = arguments.quick or arguments.group == "sweep"
    for case in group(arguments.group, arguments.quick):
        timed, notes = candidates(case, drivers)
        if small:
            times = interleave(timed, rounds=7, least=0.004, budget=0.5)
        else:
            times = interleave(timed, rounds=21, least=0.01, budget=0.7)
        row = {
            "part": case.part,
            "shape": "x".join(map(str, case.shape)),
            "layout": case.layout,
            "layer": case.layer,
            "dtype": str(case.dtype).removeprefix("torch."),
            "mode": "training" if case.training else "inference",
            "seconds": {name: dataclasses.asdict(timing) for name, timing in times.items()},
            "missing": notes,
        }
        print(json.dumps(row), flush=True)
    for driver in drivers.values():
        driver.close()
    if drivers:
        print(json.dumps({"oneDNN": drivers["nhwc"].version}), flush=True)


if __name__ == "__main__":
    main()
