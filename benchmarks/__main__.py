"""Runs the benchmarks, all or those named: ``python -m benchmarks [import] [layers]``."""

from __future__ import annotations

import sys

from benchmarks import bench_import, bench_layers
from benchmarks.harness import machine

BENCHMARKS = {"import": bench_import.main, "layers": bench_layers.main}


def main() -> int:
    wanted = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        print(f"expected benchmarks out of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    for key, value in machine().items():
        print(f"{key}: {value}")
    for name in wanted:
        BENCHMARKS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
