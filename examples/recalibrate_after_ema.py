"""An average of weights has no running statistics of its own: what that costs, and the call that mends it.

    python examples/recalibrate_after_ema.py            # some seconds

A 3 x 100 ReLU network learns scikit-learn's digits for a hundred steps, while an exponential moving average of its
weights goes along. The average is then asked about images it has not seen: with the running statistics of the latest
network (torch's default), with averages of them, and with its own, found by ``bn.recalibrate``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study import data

STEPS, BATCH, RATE, DECAY = 100, 60, 0.5, 0.99


def network(features: int, classes: int) -> nn.Sequential:
    """Three hidden layers with batch norm."""
    layers: list[nn.Module] = []
    for inputs in (features, 100, 100):
        layers += [nn.Linear(inputs, 100), nn.BatchNorm1d(100), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, classes))


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In eval mode."""
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print and return the accuracies."""
    parser = argparse.ArgumentParser(description="Running statistics of averaged weights.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    split = data.digits(options.seed)
    x, test_x = (torch.tensor(part[0], dtype=torch.float32) for part in (split.train, split.test))
    y, test_y = (torch.tensor(part[1]) for part in (split.train, split.test))
    model = network(split.features, split.classes)
    averages = {name: bn.surgery.averaged_model(model, decay=DECAY, buffers=name) for name in ("copy", "average")}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        batch = torch.randperm(len(x))[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        for averaged in averages.values():
            averaged.update_parameters(model)
    found = {"the network itself": accuracy(model, test_x, test_y)}
    found["average, statistics copied"] = accuracy(averages["copy"], test_x, test_y)
    found["average, statistics averaged"] = accuracy(averages["average"], test_x, test_y)
    bn.recalibrate(averages["copy"], x.split(100))
    found["average, recalibrated"] = accuracy(averages["copy"], test_x, test_y)
    for name, value in found.items():
        print(f"{name:<30}{value:.3f}")
    return found


if __name__ == "__main__":
    main()
