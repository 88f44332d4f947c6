"""What folding brings: a forward pass of architectures in eval, folded beside unfolded, for one image and for sixteen.

Beside it ``torch.fx.experimental.optimization.fuse``, on whose models torch.fx can read, and how many batch norms it
leaves. float32, trained-like random statistics, ratios from one interleaved run, of the processor's time on one thread:
what else a machine does counts less in that than in the time that passes.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

import batchnorm as bn
from batchnorm.nn.recognition import batch_norms
from benchmarks import harness
from benchmarks.harness import interleave, save, show

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles.model_zoo import ARCHITECTURES, Architecture, image, trained_like

NAMES = ("resnet18", "mobilenetv2_050", "efficientnet_b0", "densenet121", "regnety_002", "ghostnet_050", "levit_128s")
QUICK = ("resnet18", "mobilenetv2_050")
BATCHES = (1, 16)


class CpuClock:
    """A call's seconds of the processor."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def seconds(self, repeats: int) -> float:
        began = time.process_time()
        for _ in range(repeats):
            self.call()
        return (time.process_time() - began) / repeats


def fused_by_torch(model: nn.Module) -> nn.Module | None:
    """torch's own, where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fuse(copy.deepcopy(model)).eval()
    except Exception:  # noqa: BLE001 - torch.fx cannot read every forward
        return None


def remaining(model: nn.Module) -> int:
    """Batch norms that a model still has, as modules or as calls in its graph."""
    calls = [node.target for node in model.graph.nodes] if isinstance(model, fx.GraphModule) else []
    return sum(1 for _ in batch_norms(model)) + sum(call is functional.batch_norm for call in calls)


def measure(architecture: Architecture) -> list[dict[str, object]]:
    """A row for each size of batch."""
    model = trained_like(architecture)
    folded, fused = bn.fold(model, image(architecture)), fused_by_torch(model)
    rows = []
    for n in BATCHES:
        x = image(architecture, n)

        def call(network: nn.Module, x: torch.Tensor = x) -> CpuClock:
            return CpuClock(lambda: network(x))

        calls = {"unfolded": call(model), "folded": call(folded)}
        if fused is not None:
            calls["torch"] = call(fused)
        with torch.no_grad():
            ms = {name: 1e3 * timing.median for name, timing in interleave(calls, rounds=25, budget=3.0).items()}
        rows.append(
            {
                "model": architecture.name,
                "batch": n,
                "batch norms": remaining(model),
                "left": remaining(folded),
                "left by torch": None if fused is None else remaining(fused),
                "unfolded ms": ms["unfolded"],
                "folded ms": ms["folded"],
                "times faster": ms["unfolded"] / ms["folded"],
                "torch times faster": None if fused is None else ms["unfolded"] / ms["torch"],
            }
        )
    return rows


def main() -> None:
    names = QUICK if harness.options.quick else NAMES
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for each in ARCHITECTURES if each.name in names for row in measure(each)]
        show("Folding: a forward pass in eval, float32, one thread, beside torch.fx's fuse", rows)
        save("fold", rows)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
