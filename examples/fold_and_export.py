"""Fold the batch norms of a trained convnet into its convolutions, and write a program that needs neither.

    python examples/fold_and_export.py [--out digits.pt2]

A small convnet learns scikit-learn's digits with torch's own batch norms. ``bn.fold`` gives a copy without them,
compared with the original on an example; the copy is exported with a free batch size, read back and compared again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import batchnorm as bn


def convnet() -> nn.Sequential:
    """Two convolutions with batch norm, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print what was done; the accuracy before and after, and the largest difference of a logit."""
    parser = argparse.ArgumentParser(description="Fold batch norms and export.")
    parser.add_argument("--out", type=Path, help="where the program goes (default: a temporary file)")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(options.steps):
        batch = torch.randint(1300, (60,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()

    model.eval()
    folded = bn.fold(model, x[:60], strict=True)
    print(bn.changes(folded))
    free = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(folded, (x[:60],), dynamic_shapes=free)
    assert "batch_norm" not in str(program.graph)
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "digits.pt2"
        torch.export.save(program, path)
        read = torch.export.load(path).module()
    held_x, held_y = x[1300:], y[1300:]
    with torch.no_grad():
        before, after = model(held_x), read(held_x)
    found = {
        "before": (before.argmax(1) == held_y).float().mean().item(),
        "after": (after.argmax(1) == held_y).float().mean().item(),
        "difference": (before - after).abs().max().item(),
    }
    print(f"accuracy {found['before']:.3f} before, {found['after']:.3f} folded, exported and read back")
    print(f"largest difference of a logit {found['difference']:.1e}")
    return found


if __name__ == "__main__":
    main()
