"""Batch norm on an NVIDIA GPU, forward and backward, beside torch eager and torch.compile.

    python -m benchmarks.bench_batch_norm_gpu [--quick] [--csv FILE]

One call of a few minutes compiles, checks and times everything; a short table comes last. Without an NVIDIA GPU, or
where the kernels would not be what runs, it says so in one line and exits with 2.

Method. First the ceiling: the bandwidth of a device-to-device copy of 1 GB on this card, bytes read plus bytes written.
Then, for each shape, layout, dtype and kind (BN + ReLU; BN + add + ReLU):

- checked: y and dx on fresh random data against float64 (in eight channels), with outputs poisoned by NaN in
  the memory that the allocator hands out, and no further off than torch's own;
- timed: a step is forward and backward by the modules people write, on inputs that rotate among enough copies to
  exceed the second-level cache three times over; CUDA events around each step, a warm-up first, contenders in turn
  round by round, medians with the 20% and 80% quantiles;
- counted: the least bytes that must move (forward: read x and residual, write y; backward: read dy and x, write dx and
  the residual's gradient), over the time, as a share of the ceiling; and the same where what statistics and sums are
  made of is read twice, as it must be when a channel with those that share its memory exceeds the cache.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.ops import native, reference
from benchmarks import harness

# ResNet-50's own at batch 256, and a large image model's.
SHAPES = (
    (256, 64, 112, 112),
    (256, 64, 56, 56),
    (256, 256, 56, 56),
    (256, 512, 28, 28),
    (256, 1024, 14, 14),
    (256, 2048, 7, 7),
    (64, 128, 256, 256),
)
CASES = ((torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format))
FORMATS = {torch.channels_last: "channels_last", torch.contiguous_format: "contiguous"}
DEVICE = "cuda"
KINDS = ("relu", "add+relu")
CONTENDERS = ("ours", "eager", "compile")
ROUNDS = 20
CHECKED_CHANNELS = 8


class Step(nn.Module):
    """torch's own: batch norm, perhaps an addition, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(bn(x) + residual)"""
        y = self.norm(x)
        return torch.relu(y if residual is None else y + residual)


class Ours(nn.Module):
    """The same in one layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = bn.nn.BatchNorm2d(channels, activation="relu")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(bn(x) + residual)"""
        return self.norm(x, residual=residual)


def main(path: Path = Path("runs/batch_norm_gpu.csv")) -> int:
    """Run everything, or with ``--quick`` two shapes; the exit code says whether all checks passed."""
    quick = harness.options.quick
    reason = why_not()
    if reason:
        print(f"no benchmark of the GPU kernels: {reason}", file=sys.stderr)
        return 2
    card = describe()
    for key, value in card.items():
        print(f"{key}: {value}")
    ceiling = copy_bandwidth()
    print(f"ceiling: a copy of 1 GB moves {ceiling / 1e9:.0f} GB/s")
    rows = []
    for shape in SHAPES[1:3] if quick else SHAPES:
        for dtype, memory_format in CASES:
            for kind in KINDS:
                rows += measure(shape, dtype, memory_format, kind, ceiling, 6 if quick else ROUNDS)
                print(line(rows[-len(CONTENDERS) :]), flush=True)
                torch.cuda.empty_cache()
    save(path, card | {"copy GB/s": round(ceiling / 1e9)}, rows)
    show(rows)
    failed = [row for row in rows if row["passed"] is False]
    print(f"{path}; " + (f"{len(failed)} checks FAILED" if failed else "all checks passed"))
    return 1 if failed else 0


def why_not() -> str:
    """Why the kernels would not be measured here; empty where they would. Compiles the first of them."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU here"
    torch.ops.batchnorm.stats(torch.ones(2, 2, device=DEVICE), None)
    return native.status().cuda_reason


def describe() -> dict[str, Any]:
    """What a number must not be quoted without."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cache MB": properties.L2_cache_size >> 20,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "batchnorm": bn.__version__,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the best of 20 copies of 1 GB of random data."""
    source = torch.randint(0, 2**31 - 1, (2**28,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(23)][3:]
    return 2 * source.numel() * 4 / (min(times) * 1e-3)


def measure(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    kind: str,
    ceiling: float,
    rounds: int,
) -> list[dict[str, Any]]:
    """Check and time the contenders on one case: a row each."""
    channels, numel = shape[1], torch.Size(shape).numel()
    added = kind == "add+relu"
    ours, eager = Ours(channels).to(DEVICE), Step(channels).to(DEVICE)
    torch._dynamo.reset()
    modules = dict(zip(CONTENDERS, (ours, eager, torch.compile(Step(channels).to(DEVICE), dynamic=False)), strict=True))
    bytes_least = numel * dtype.itemsize * (2 + 3 + (2 if added else 0))
    bytes_twice = bytes_least + numel * dtype.itemsize * (1 + 2)

    # Enough inputs that none is left in the cache when its turn comes again.
    each = numel * dtype.itemsize * (3 if added else 2)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(8, 1 + 3 * cache // each))
    inputs = [fresh(shape, dtype, memory_format, added) for _ in range(copies)]
    errors = {name: check(module, shape, dtype, memory_format, added) for name, module in modules.items()}
    limit = max(4 * torch.finfo(dtype).eps, errors["eager"])

    times: dict[str, list[float]] = {name: [] for name in modules}
    turn = 0
    for number in range(rounds + 3):
        for name, module in modules.items():
            x, residual, grad = inputs[turn % copies]
            turn += 1
            taken = milliseconds(lambda m=module, x=x, r=residual, g=grad: step(m, x, r, g))
            if number >= 3:
                times[name].append(taken)
    rows = []
    for name, values in times.items():
        low, _, _, high = statistics.quantiles(values, n=5)
        median = statistics.median(values)
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "layout": FORMATS[memory_format],
                "kind": kind,
                "contender": name,
                "ms": median,
                "ms 20%": low,
                "ms 80%": high,
                "of the ceiling": bytes_least / (median * 1e-3) / ceiling,
                "read twice": bytes_twice / (median * 1e-3) / ceiling,
                "beyond the cache": each > cache,
                "error": errors[name],
                "passed": errors[name] <= limit if name == "ours" else None,
            }
        )
    return rows


def fresh(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, added: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """x, perhaps a residual, and the gradient of y."""

    def draw() -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=memory_format).normal_()

    x = draw().add_(0.5).requires_grad_()
    return x, draw().requires_grad_() if added else None, draw()


def step(module: nn.Module, x: Tensor, residual: Tensor | None, grad: Tensor) -> Tensor:
    """Forward and backward; gradients are made anew, not added up."""
    x.grad = None
    if residual is not None:
        residual.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    y = module(x) if residual is None else module(x, residual)
    y.backward(grad)
    return y


def check(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, added: bool
) -> float:
    """The larger of the relative errors of y and dx, in a few channels. NaN where one was left unwritten."""
    x, residual, grad = fresh(shape, dtype, memory_format, added)
    module.train()
    poison = [torch.full_like(x, torch.nan) for _ in range(2)]
    del poison
    y = step(module, x, residual, grad)
    assert x.grad is not None
    if not bool(y.isfinite().all()) or not bool(x.grad.isfinite().all()):
        return float("nan")
    some = torch.linspace(0, shape[1] - 1, CHECKED_CHANNELS, device=DEVICE).long()
    wide, wide_grad = (t.detach().index_select(1, some).double() for t in (x, grad))
    wide_residual = None if residual is None else residual.detach().index_select(1, some).double()
    exact, count, mean, _, invstd, sign = reference.train_forward(wide, None, None, wide_residual, None, 1e-5, "relu")
    saved = (mean, invstd, None, None, None, sign if added else None, None, "relu", count, False)
    exact_dx = reference.train_backward(wide_grad, wide, *saved)[0]
    return max(
        error_of(ours.detach().index_select(1, some).double(), truth)
        for ours, truth in ((y, exact), (x.grad, exact_dx))
    )


def error_of(ours: Tensor, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||: within a rounding of the kink a value more or less may pass, for everyone."""
    return ((ours - truth).norm() / truth.norm()).item()


def milliseconds(call: Callable[[], object]) -> float:
    """The time of one call between two events, on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def line(rows: list[dict[str, Any]]) -> str:
    """One case in one line."""
    ours, eager, compiled = rows
    return (
        f"{ours['shape']:>16} {ours['dtype']:>8} {ours['layout']:>13} {ours['kind']:>8}: {ours['ms']:7.3f} ms, "
        f"{eager['ms'] / ours['ms']:5.2f} x eager, {compiled['ms'] / ours['ms']:5.2f} x compile, "
        f"{ours['of the ceiling']:4.0%} of the ceiling, {ours['read twice']:4.0%} if all is read twice"
        f"{'' if ours['passed'] else '  WRONG'}"
    )


def save(path: Path, card: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Every row with the card beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *card])
        writer.writeheader()
        writer.writerows(row | card for row in rows)


def show(rows: list[dict[str, Any]]) -> None:
    """The short table."""
    print(f"\n{time.strftime('%H:%M')}  times faster than eager, than compile, and the share of the ceiling")
    for first in range(0, len(rows), len(CONTENDERS)):
        print(line(rows[first : first + len(CONTENDERS)]))


def command() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes and fewer rounds, in about a minute")
    parser.add_argument("--csv", type=Path, default=Path("runs/batch_norm_gpu.csv"), help="where every number goes")
    arguments = parser.parse_args()
    harness.options.quick = arguments.quick
    return main(arguments.csv)


if __name__ == "__main__":
    sys.exit(command())
