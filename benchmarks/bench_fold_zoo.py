"""Folding on every architecture of the tests: how many batch norms are folded, and how far outputs move.

``moved``: the largest difference of an output, relative to the largest output, between the folded and the unfolded
model in float32, on two images that were not the example. ``rounding``: the same between each of them and the unfolded
model in float64. Statistics are trained-like (those of random images, off by a tenth of a deviation). A model that
``bn.fold`` refuses at its own tolerance of 1e-4 is folded at 1e-2.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor

import batchnorm as bn
from benchmarks import harness
from benchmarks.bench_fold import ARCHITECTURES, QUICK, Architecture, image, trained_like
from benchmarks.harness import save, show


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@torch.no_grad()
def measure(architecture: Architecture) -> dict[str, object]:
    """One row of the table."""
    model, example, x = trained_like(architecture), image(architecture, seed=3), image(architecture, 2, seed=4)
    refused, began = "", time.perf_counter()
    try:
        folded = bn.fold(model, example)
    except bn.SurgeryError:
        refused = "at 1e-4"
        folded = bn.fold(model, example, rtol=1e-2)
    seconds = time.perf_counter() - began
    done = [" folded into " in change.what for change in bn.changes(folded)]
    y, found, exact = model(x), folded(x), copy.deepcopy(model).double()(x.double())
    return {
        "model": architecture.name,
        "batch norms": len(done),
        "folded": sum(done),
        "moved": off(found, y),
        "rounding before": off(y, exact),
        "rounding after": off(found, exact),
        "refused": refused,
        "seconds": seconds,
    }


def main() -> None:
    chosen = [each for each in ARCHITECTURES if not harness.options.quick or each.name in QUICK]
    rows = [measure(each) for each in chosen]
    show("Folding: architectures with trained-like statistics, float32", rows)
    save("fold_zoo", rows)


if __name__ == "__main__":
    main()
