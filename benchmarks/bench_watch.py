"""What watching costs: a training step of a watched model beside the same model's without.

Each candidate trains a model of its own, in turn, a cycle of EVERY steps at a time, with one look. The target is at
most 5% at every=20. "between" is a watch that never looks.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import batchnorm as bn
from benchmarks.harness import options, save, show

EVERY = 20
WANTED = 1.05
NEVER = 10**9


def mlp() -> nn.Module:
    """The paper's MNIST network on 8x8 digits: three layers of 100 sigmoids."""
    sizes = (64, 100, 100, 100)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def convnet() -> nn.Module:
    """Four convolutions with batch norm, on 32x32 images."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 3x100, batch 60": (mlp, (60, 64)),
    "convnet, batch 32": (convnet, (32, 3, 32, 32)),
}


def step(model: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """A training step: forward, loss, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = torch.randn(shape), torch.randint(0, 10, shape[:1])

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds a step of each candidate (medians), and the ratios to the unwatched model's cycle of the same round.

    A ratio is a median over rounds: other programs slow down whole rounds. Who begins a round changes from one to the
    next.
    """
    steps, watches = {}, []
    for name, every in (("plain", None), ("between", NEVER), ("watched", EVERY)):
        torch.manual_seed(0)
        model = make()
        if every is not None:
            watches.append(bn.watch(model, every=every))
        steps[name] = step(model, shape)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        names = list(steps)[turn % 3 :] + list(steps)[: turn % 3]
        for name in names:
            run = steps[name]
            began = time.perf_counter()
            for _ in range(EVERY):
                run()
            if turn:  # the first cycle warms up
                seconds[name].append((time.perf_counter() - began) / EVERY)
    for watch in watches:
        watch.remove()
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        for name in ("between", "watched")
    }
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        **ratios,
        "looks": len({record["step"] for record in watches[1].records}),
    }


def main() -> None:
    torch.set_num_threads(1)  # a look has one; and a small step on two waits for whatever else the machine does
    rows = []
    for name, (make, shape) in CASES.items():
        rounds = 300 if len(shape) == 2 else 21
        rows.append({"model": name, **measure(make, shape, rounds // 10 if options.quick else rounds)})
    columns = ("model", "between", "watched")
    show(
        f"a training step, watched at every={EVERY}, over the same without",
        [{c: row[c] for c in columns} for row in rows],
    )
    worst = max(row["watched"] for row in rows)
    print(f"target <= {WANTED}: worst {worst:.3f}, {'met' if worst <= WANTED else 'not met'}")
    path = save("watch", rows, target={"wanted": f"<= {WANTED}", "worst": worst, "met": worst <= WANTED})
    if path:
        print(f"saved as {path}")


if __name__ == "__main__":
    main()
