"""Learning from data in batches: peers that stream, and files larger than one wants in memory.

The first table has one stream of batches in memory and everything that can learn from it bit by bit, in one interleaved
run. The second has a 10 GB ``.npy`` and a 5 GB Parquet dataset, made in the system's temporary folder (TMPDIR) and
removed: each fitted in a process of its own, from a cold cache, beside a process that only reads or decodes the same
bytes. "MB resident" is the process's peak beyond what it had when its imports were done, for Ray that of its worst
worker.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import interleave, save, show

GB = 2**30
ROWS, COLUMNS = 2**16, 256  # of a block, 64 MB
BATCHES, BATCH_ROWS, FEATURES = 100, 2000, 256


def blocks(total_bytes: int) -> Any:
    """Blocks of float32 that together are ``total_bytes``; all differ, though one random block is behind them."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    for i in range(total_bytes // block.nbytes):
        yield np.roll(block, i, axis=0) + np.float32(i % 7)


def make_npy(path: Path, total_bytes: int) -> None:
    rows = total_bytes // (ROWS * COLUMNS * 4) * ROWS
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, COLUMNS)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks(total_bytes):
            block.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def make_parquet(folder: Path, total_bytes: int, blocks_per_file: int = 8) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    names = [f"x{i}" for i in range(COLUMNS)]
    writer = None
    for i, block in enumerate(blocks(total_bytes)):
        table = pa.table(dict(zip(names, map(pa.array, np.ascontiguousarray(block.T)), strict=True)))
        if i % blocks_per_file == 0:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(
                folder / f"part-{i // blocks_per_file:03d}.parquet", table.schema, use_dictionary=False
            )
        assert writer is not None
        writer.write_table(table, row_group_size=ROWS)
    if writer is not None:
        writer.close()


def forget(path: Path) -> None:
    """Take a file or the files of a folder out of the system's cache."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# ---- what a process of its own does ---------------------------------------------------------------------------------


def resident(field: str = "VmHWM", process: str = "self") -> float:
    """Of a process, in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def read_npy(path: str) -> None:
    buffer = bytearray(32 * 2**20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def map_npy(path: str) -> None:
    from batchnorm.preprocessing import StandardScaler

    StandardScaler().fit(np.load(path, mmap_mode="r"))


def decode_parquet(path: str) -> None:
    import pyarrow.dataset as ds

    for _ in ds.dataset(path).to_batches(batch_readahead=2, fragment_readahead=1):
        pass


def fit(path: str) -> None:
    from batchnorm.preprocessing import StandardScaler

    StandardScaler().fit(path)


def whiten(path: str) -> None:
    from batchnorm.preprocessing import Whitener

    Whitener().fit(path)


def fit_on_ray(path: str) -> None:
    from batchnorm.preprocessing import StandardScaler, fit_files_on_ray

    fit_files_on_ray(StandardScaler(), path)


RAY = "StandardScaler, two Ray workers"
TASKS: dict[str, Callable[[str], None]] = {
    "read": read_npy,
    "decode": decode_parquet,
    "memory map, StandardScaler": map_npy,
    "StandardScaler": fit,
    "Whitener": whiten,
    RAY: fit_on_ray,
}


class Workers(threading.Thread):
    """Watches the workers of the Ray cluster: the most memory of its own that one of them has had, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.look()

    def look(self) -> float:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "cmdline").read_bytes().startswith(b"ray::"):
                    self.peak = max(self.peak, resident("RssAnon", process.name))
        return self.peak


def child_on_ray(path: str) -> dict[str, float]:
    """The same for Ray: what its worst worker took beyond what it had after a first, small fit."""
    import ray

    from batchnorm.preprocessing import StandardScaler

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2 * GB, log_to_driver=False)
    StandardScaler().fit(ray.data.from_numpy([np.ones((8, 2)), np.zeros((8, 2))]))
    before, watched = Workers().look(), Workers()
    watched.start()
    began = time.perf_counter()
    TASKS[RAY](path)
    seconds = time.perf_counter() - began
    watched.over.set()
    ray.shutdown()
    return {"seconds": seconds, "resident": watched.peak - before}


def child(task: str, path: str) -> None:
    """Runs one task; prints its seconds and how much memory it took beyond the imports."""
    if task == RAY:
        print(json.dumps(child_on_ray(path)))
        return
    import pyarrow.dataset
    import pyarrow.parquet  # noqa: F401

    from batchnorm.preprocessing import StandardScaler, Whitener

    StandardScaler().fit(np.ones((4, 2), np.float32) * np.arange(4, dtype=np.float32)[:, None])
    Whitener("zca").fit(np.ones((4, 2), np.float32) * np.arange(4, dtype=np.float32)[:, None])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    began = time.perf_counter()
    TASKS[task](path)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "resident": resident() - before}))


def measured(task: str, path: Path) -> dict[str, float]:
    forget(path)
    command = [*harness.options.under, sys.executable, "-m", "benchmarks.bench_streams", task, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def large_files(folder: Path) -> list[dict[str, object]]:
    scale = 8 if harness.options.quick else 1
    npy, parquet = folder / "data.npy", folder / "data.parquet"
    rows: list[dict[str, object]] = []
    for path, size, make, floor, tasks in (
        (npy, 10 * GB // scale, make_npy, "read", ("StandardScaler", "memory map, StandardScaler", RAY, "Whitener")),
        (parquet, 5 * GB // scale, make_parquet, "decode", ("StandardScaler", RAY, "Whitener")),
    ):
        make(path, size)
        size = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
        alone = measured(floor, path)
        for task, result in ((floor, alone), *((task, measured(task, path)) for task in tasks)):
            rows.append(
                {
                    "data": path.suffix,
                    "GB": size / GB,
                    "what": f"{task} alone" if task == floor else task,
                    "seconds": result["seconds"],
                    "GB/s": size / GB / result["seconds"],
                    "over it": result["seconds"] / alone["seconds"],
                    "MB resident": result["resident"],
                }
            )
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rows


# ---- in memory ------------------------------------------------------------------------------------------------------


def streaming_peers() -> list[dict[str, object]]:
    import pandas as pd
    import torch
    from kornia.enhance import ZCAWhitening
    from river.preprocessing import StandardScaler as River
    from sklearn.decomposition import IncrementalPCA
    from sklearn.preprocessing import StandardScaler as Peer

    from batchnorm.preprocessing import StandardScaler, Whitener

    rng = np.random.default_rng(0)
    mix = rng.standard_normal((FEATURES, FEATURES)).astype(np.float32)
    batches = [rng.standard_normal((BATCH_ROWS, FEATURES), dtype=np.float32) @ mix for _ in range(BATCHES)]
    frames = [pd.DataFrame(batch, columns=[f"x{i}" for i in range(FEATURES)]) for batch in batches]
    whole = torch.from_numpy(np.concatenate(batches))

    def learn(make: Callable[[], Any], method: str, data: list[Any]) -> Callable[[], None]:
        def run() -> None:
            estimator = make()
            for batch in data:
                getattr(estimator, method)(batch)

        return run

    tasks: dict[str, dict[str, Callable[[], object]]] = {
        "mean and variance": {
            "ours": learn(StandardScaler, "partial_fit", batches),
            "scikit-learn partial_fit": learn(Peer, "partial_fit", batches),
            "River learn_many": learn(River, "learn_many", frames),
        },
        "whitening, streamed": {
            "ours": lambda: Whitener().fit(iter(batches)),
            "IncrementalPCA": learn(IncrementalPCA, "partial_fit", batches),
        },
        "ZCA, in memory": {
            "ours": lambda: Whitener("zca").fit(whole),
            "Kornia ZCAWhitening": lambda: ZCAWhitening().fit(whole),
        },
    }
    import ray
    from ray.data.preprocessors import StandardScaler as RayPeer

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=GB, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # or a plan is printed at every fit
    dataset = ray.data.from_pandas(frames).materialize()
    tasks["mean and variance, Ray Dataset"] = {
        "ours": lambda: StandardScaler().fit(dataset),
        "Ray Data StandardScaler": lambda: RayPeer(list(frames[0].columns)).fit(dataset),
    }
    rows: list[dict[str, object]] = []
    for task, calls in tasks.items():
        ms = {name: 1e3 * timing.median for name, timing in interleave(calls, rounds=7).items()}
        rows.extend(
            {"task": task, "peer": name, "ours ms": ms["ours"], "peer ms": time_, "times faster": time_ / ms["ours"]}
            for name, time_ in ms.items()
            if name != "ours"
        )
    ray.shutdown()
    return rows


def main() -> None:
    peers = streaming_peers()
    show(f"{BATCHES} batches of {BATCH_ROWS} x {FEATURES}, float32", peers)
    with tempfile.TemporaryDirectory(prefix="batchnorm-bench-") as folder:
        files = large_files(Path(folder))
    show("Files, from a cold cache, beside reading or decoding alone", files)
    save("streams", files, peers=peers)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2])
