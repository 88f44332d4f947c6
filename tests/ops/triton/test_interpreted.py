"""The kernels in Triton's interpreter, on the CPU. It must be on before Triton is imported: a process for each file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreted"
FILES = sorted(HERE.glob("test_*.py"))

pytest.importorskip("triton", reason="Triton is not installed (pip install batchnorm[gpu])")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--tb=short", str(file)]
    finished = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[3],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert re.search(r"\b\d+ passed", finished.stdout), finished.stdout
    assert "skipped" not in finished.stdout
