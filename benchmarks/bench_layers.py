"""A training step of our layers beside torch's: forward and backward, ratios from one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import batchnorm as bn
from benchmarks.harness import interleave, save, show

SHAPES = ((60, 100), (256, 100), (4096, 1024), (8, 8, 4, 4), (2, 64, 128, 128), (64, 64, 56, 56))
CLASSES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def step(module: Any, shape: tuple[int, ...], memory_format: torch.memory_format) -> Callable[[], None]:
    x = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn(shape).contiguous(memory_format=memory_format)

    def run() -> None:
        x.grad = None
        module(x).backward(dy)

    return run


def main() -> None:
    rows = []
    for shape in SHAPES:
        formats = {"contiguous": torch.contiguous_format}
        if len(shape) == 4:
            formats["channels_last"] = torch.channels_last
        for format_name, memory_format in formats.items():
            name = CLASSES[len(shape)]
            theirs = torch.nn.Sequential(getattr(torch.nn, name)(shape[1]), torch.nn.ReLU())
            ours = getattr(bn.nn, name)(shape[1], activation="relu")
            times = interleave({"torch": step(theirs, shape, memory_format), "ours": step(ours, shape, memory_format)})
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "layout": format_name,
                    "torch ms": 1e3 * times["torch"].median,
                    "ours ms": 1e3 * times["ours"].median,
                    "times faster": times["torch"].median / times["ours"].median,
                }
            )
    show("BN + ReLU, float32, forward and backward", rows)
    save("layers", rows)


if __name__ == "__main__":
    main()
