"""Would batch norm help this network on these data? ``bn.compare`` on a perceptron and a table of measurements.

    python examples/compare_your_network.py [--steps 200] [--seeds 3] [--out comparison.html]

Put your own in the place of ``make`` and of the data: a function of the normalization that returns a model, and arrays
or loaders. docs/compare.md says what is held equal, and how the verdict is found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import batchnorm as bn


def make(norm) -> nn.Module:
    """``norm(features)`` is the normalization, or nothing."""
    return nn.Sequential(
        nn.Linear(30, 32), norm(32), nn.ReLU(), nn.Linear(32, 32), norm(32), nn.ReLU(), nn.Linear(32, 2)
    )


def main(arguments: list[str] | None = None):
    """Print the verdict and the table; the comparison."""
    parser = argparse.ArgumentParser(description="Compare normalizations on your network.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the page here")
    options = parser.parse_args(arguments)
    table = load_breast_cancer()
    x = torch.tensor(bn.preprocessing.StandardScaler().fit_transform(table.data), dtype=torch.float32)
    y = torch.tensor(table.target)
    comparison = bn.compare(
        make,
        (x, y),
        variants=("none", "batch", "group=8"),
        steps=options.steps,
        lrs=[0.03, 0.1, 0.3],
        seeds=options.seeds,
    )
    print(comparison.verdict)
    print(comparison.table())
    if options.out:
        comparison.to_html(options.out)
    return comparison


if __name__ == "__main__":
    main()
