"""The command line as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Small enough for seconds, and still tuning, counter-examples and all.
TINY = """
seeds = 1
sections = ["headline"]
[headline]
seeds = 1
lrs = [2.0]
tune_steps = 20
steps = 20
conservative_steps = 20
wide_lrs = [1.0]
relu_lrs = [0.3]
counter_steps = 10
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Finished:
    """A tiny study that ran to its end, and what it said."""

    folder: Path
    outcome: Outcome


def shell(*arguments: str, cwd: Path | None = None, prelude: str = "", **environment: str) -> Outcome:
    """Run it in a process of its own; ``prelude`` is Python that goes first."""
    command = [sys.executable, "-m", "batchnorm", *arguments]
    if prelude:
        code = f"{prelude}\nimport sys\nfrom batchnorm.cli import main\nmain(sys.argv[1:])"
        command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, capture_output=True, cwd=cwd, env={**os.environ, **environment}, timeout=120, check=False
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())
