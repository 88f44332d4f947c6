"""oneDNN's own batch normalization as a peer: builds the driver beside this file where the library is installed.

On Debian and Ubuntu that is the package libdnnl-dev. The driver is a process of its own (two OpenMP runtimes do not
share one well) that measures when it is told to, so that its rounds interleave with everyone else's.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("driver.cpp")
PROGRAM = Path(__file__).parents[2] / "build" / "onednn" / "driver"


@functools.cache
def missing() -> str:
    """Why there is no driver; empty where there is one."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no compiler"
    if PROGRAM.exists() and PROGRAM.stat().st_mtime > SOURCE.stat().st_mtime:
        return ""
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-std=c++17", str(SOURCE), "-ldnnl", "-o", str(PROGRAM)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode == 0:
        return ""
    return "not installed" if "dnnl.hpp" in built.stderr else "does not compile"


class Driver:
    """A running driver."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        self.version = self._answer()

    def prepare(self, shape: tuple[int, int, int, int], layout: str, relu: bool) -> None:
        """Set the case: ``layout`` is "nhwc" or "blocked"."""
        self._ask(f"{' '.join(map(str, shape))} {layout} {int(relu)}")

    def seconds(self, repeats: int) -> float:
        """Seconds a step, the mean over so many."""
        return float(self._ask(f"time {repeats}"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer or answer.startswith("failed"):
            raise RuntimeError(f"oneDNN's driver: {answer or 'it ended'}")
        return answer
