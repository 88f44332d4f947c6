"""Watch a network without and one with batch norm learn digits: in the terminal while they train, and on two pages.

    python examples/watch_training.py [--steps 600] [--out FOLDER]

Both are Ioffe & Szegedy's small network (3 x 100 sigmoid). What to look for: how far the input of the last sigmoid
moves (``watch.shift()``), in units of its standard deviation and in its own. docs/watch.md says what that does not
explain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import batchnorm as bn


def network(normalized: bool) -> nn.Sequential:
    """64 - 100 - 100 - 100 - 10, sigmoid."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    width = 64
    for _ in range(3):
        layers.append(nn.Linear(width, 100, bias=not normalized))
        nn.init.xavier_normal_(layers[-1].weight)
        layers += [nn.BatchNorm1d(100), nn.Sigmoid()] if normalized else [nn.Sigmoid()]
        width = 100
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(model: nn.Sequential, steps: int, page: Path) -> float:
    """SGD with batches of 60, watched at the last sigmoid; the accuracy on data that it has not seen."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    learn, rest = order[:1300], order[1300:]
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Sigmoid)][-1]
    with bn.report.LiveView() as view, bn.watch(model, every=25, layers=last, on_look=view) as watch:
        for _ in range(steps):
            batch = learn[torch.randint(len(learn), (60,))]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    watch.to_html(page)
    (row,) = watch.shift()
    print(
        f"  moves {row['wasserstein_std']:.2f} std, {row['wasserstein_absolute']:.2f} in its own units, per 100 steps"
    )
    model.eval()
    with torch.no_grad():
        return (model(x[rest]).argmax(1) == y[rest]).float().mean().item()


def main() -> None:
    """Both networks, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, normalized in (("without batch norm", False), ("with batch norm", True)):
        print(name)
        page = arguments.out / f"watch-{'with' if normalized else 'without'}.html"
        print(f"  accuracy {train(network(normalized), arguments.steps, page):.3f}, page {page}")


if __name__ == "__main__":
    main()
