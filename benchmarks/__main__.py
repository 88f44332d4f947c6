"""Runs the benchmarks, all or those named: ``python -m benchmarks [import] [layers] ... [--quick] [--under COMMAND]``.

A benchmark is a file ``bench_<name>.py`` with a ``main()``. ``--quick`` takes a subset and saves nothing. ``--under
"taskset -c 0,1"`` starts the processes that measure layers under a command.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from benchmarks import harness

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"out of {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a subset, in about a minute")
    parser.add_argument("--under", default="", help="a command that measuring processes are started under")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        print(f"expected benchmarks out of {', '.join(NAMES)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    harness.options.quick, harness.options.under = arguments.quick, tuple(shlex.split(arguments.under))
    for key, value in harness.machine().items():
        print(f"{key}: {value}")
    for name in arguments.names or NAMES:
        importlib.import_module(f"benchmarks.bench_{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
