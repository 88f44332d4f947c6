"""What `import batchnorm` costs beyond `import torch`, and each room after it. Fresh processes, medians."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.harness import save, show

STATEMENTS = {
    "import batchnorm": "import batchnorm",
    "batchnorm.nn": "import batchnorm; batchnorm.nn",
    "batchnorm.preprocessing": "import batchnorm; batchnorm.preprocessing",
}
ROUNDS = 7


def seconds(statement: str) -> float:
    """Seconds that a statement takes in a fresh process which has imported torch already."""
    code = f"import torch, time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    rows = []
    for name, statement in STATEMENTS.items():
        times = [seconds(statement) for _ in range(ROUNDS)]
        rows.append({"what": name, "median ms": 1e3 * statistics.median(times), "worst ms": 1e3 * max(times)})
    show("Import, beyond `import torch`", rows)
    save("import", rows)


if __name__ == "__main__":
    main()
