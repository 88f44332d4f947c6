"""What reading costs in memory, what it shows, and what becomes of its buffers."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchnorm.preprocessing import StandardScaler
from batchnorm.preprocessing.sources import open_source
from batchnorm.preprocessing.sources.raw import Buffers

MEASURE = """
import sys
import numpy as np, pyarrow.parquet, pyarrow.compute
from batchnorm.preprocessing import StandardScaler

def megabytes(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

StandardScaler().fit(np.ones((100, 3), np.float32))
before = megabytes("VmRSS")
scaler = StandardScaler().fit(sys.argv[1])
print(scaler.n_samples_seen_, megabytes("VmHWM") - before)
"""


def write_npy(path: Path, *, order: str) -> int:
    """400 MB of zeros that take no room on the disk."""
    rows = 400_000
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": order == "F", "shape": (rows, 250)}
        )
        file.truncate(file.tell() + rows * 1000)
    return rows


def write_parquet(path: Path) -> int:
    """200 MB of numbers that repeat, in row groups of 50 MB."""
    column = pa.array(np.arange(1_000_000) % 1000 / 8)
    pq.write_table(pa.table({f"c{i}": column for i in range(25)}), path, row_group_size=250_000)
    return 1_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of the process")
@pytest.mark.parametrize("name", ["x.npy", "fortran.npy", "x.parquet"])
def test_the_memory_of_a_fit_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = write_parquet(path) if name == "x.parquet" else write_npy(path, order=name[0].upper())
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    seen, grown = done.stdout.split()
    assert int(seen) == rows
    # A decoder holds several times what it gives.
    assert float(grown) < (200 if name == "x.parquet" else 150)


def test_buffers_are_used_again_once_nobody_holds_them() -> None:
    buffers = Buffers(80)
    first = buffers.take()
    address = first.ctypes.data
    del first
    again = buffers.take()
    assert again.ctypes.data == address
    view = again[:16].view(np.float64).reshape(2, 1)
    del again
    other = buffers.take()
    assert not np.shares_memory(other, view)
    del view, other
    assert buffers.take().ctypes.data == address


def test_parts_that_are_kept_stay_as_they_are(tmp_path: Path) -> None:
    values = np.arange(3000.0).reshape(1000, 3)
    np.save(tmp_path / "x.npy", values)
    kept = [part.values[1:] for part in open_source(tmp_path / "x.npy", batch_rows=10)]
    np.testing.assert_array_equal(np.stack(kept), values.reshape(100, 10, 3)[:, 1:])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["x.npy", "x.csv"])
def test_progress_is_drawn_on_a_terminal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    values = np.arange(3000.0).reshape(1000, 3)
    if name == "x.npy":
        np.save(path, values)
    else:
        path.write_text("a,b,c\n" + "\n".join(",".join(map(str, row)) for row in values) + "\n")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        StandardScaler().fit(open_source(path, batch_rows=100, progress=True))
        text: Any = stream.getvalue()
        if isinstance(stream, Terminal):
            assert str(path) in text.replace("\n", "")
            assert ("1,000 of 1,000 rows" if name == "x.npy" else "1,000 rows") in text
        else:
            assert text == ""
