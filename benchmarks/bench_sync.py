"""What SyncBatchNorm costs: with one rank beside the plain layer, and what two ranks add, on gloo and the CPU.

The target is a step of at most 1.1 times the plain layer's with one rank. Two ranks are for the record: what they add
is the backend's latency, twice. torch's own SyncBatchNorm does not run on the CPU.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import batchnorm as bn
from benchmarks.harness import interleave, options, save, show

SHAPES = ((32, 16), (256, 100), (8, 64, 28, 28), (32, 64, 56, 56))
PLAIN = {2: "BatchNorm1d", 4: "BatchNorm2d"}
THREADS = 2
WANTED = 1.1
EXCHANGES = 300


def step(layer: torch.nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """A training step: forward, backward from a ready gradient."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def run() -> None:
        x.grad = None
        layer(x).backward(dy)

    return run


def meet(folder: str, rank: int, ranks: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)


def alone() -> list[dict[str, Any]]:
    """One rank, before and after there is a process group."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for grouped in (False, True):
            if grouped:
                meet(folder, 0, 1)
            for shape in SHAPES:
                plain = getattr(bn.nn, PLAIN[len(shape)])(shape[1])
                times = interleave(
                    {"plain": step(plain, shape), "sync": step(bn.nn.SyncBatchNorm(shape[1]), shape)},
                    rounds=7 if options.quick else 25,
                    least=0.01,
                )
                rows.append(
                    {
                        "ranks": "one, grouped" if grouped else "one, no group",
                        "shape": "x".join(map(str, shape)),
                        "seconds": {name: dataclasses.asdict(timing) for name, timing in times.items()},
                        "ratio": times["sync"].median / times["plain"].median,
                    }
                )
        distributed.destroy_process_group()
    return rows


def together(rank: int, folder: str, results: Any) -> None:
    """One of two ranks, a thread each: the step, and the two collectives by themselves."""
    torch.set_num_threads(1)
    meet(folder, rank, 2)
    collectives = torch.ops._c10d_functional
    name = distributed.group.WORLD.group_name
    for shape in SHAPES:
        sums = torch.randn(2 * shape[1], dtype=torch.float64)

        def exchange(sums: torch.Tensor = sums) -> None:
            collectives.wait_tensor(collectives.all_gather_into_tensor(sums, 2, name))
            collectives.wait_tensor(collectives.all_reduce(sums, "sum", name))

        plain = getattr(bn.nn, PLAIN[len(shape)])(shape[1])
        calls = {"plain": step(plain, shape), "sync": step(bn.nn.SyncBatchNorm(shape[1]), shape), "exchange": exchange}
        row = {}
        for what, call in calls.items():
            call()
            distributed.barrier()
            row[what] = timed(call)
        if rank == 0:
            results.send({"ranks": "two", "shape": "x".join(map(str, shape)), "each us": row})
    distributed.destroy_process_group()


def timed(call: Callable[[], None]) -> float:
    """Microseconds a call. Both ranks repeat it equally often: how often cannot depend on the time it takes."""
    repeats = EXCHANGES // 5 if options.quick else EXCHANGES
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e6 * (time.perf_counter() - began) / repeats


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    rows = alone()
    show(
        "one rank: a step of SyncBatchNorm over the plain layer's",
        [{"ranks": row["ranks"], "shape": row["shape"], "ratio": row["ratio"]} for row in rows],
    )
    worst = max(rows, key=lambda row: row["ratio"])
    met = worst["ratio"] <= WANTED
    print(f"target <= {WANTED}: worst {worst['ratio']:.2f} at {worst['shape']}, {'met' if met else 'not met'}")
    start = multiprocessing.get_context("spawn")
    ours, theirs = start.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        workers = [start.Process(target=together, args=(rank, folder, theirs)) for rank in range(2)]
        for worker in workers:
            worker.start()
        theirs.close()
        pairs = [ours.recv() for _ in SHAPES]
        for worker in workers:
            worker.join()
    show(
        "two ranks: microseconds of a step, and of the two collectives by themselves",
        [{"shape": row["shape"], **row["each us"]} for row in pairs],
    )
    path = save("sync", rows + pairs, target={"wanted": f"<= {WANTED}", "worst": worst["ratio"], "met": met})
    if path:
        print(f"saved as {Path(path)}")


if __name__ == "__main__":
    main()
