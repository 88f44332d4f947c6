"""What a look at the landscape costs, and which of its measures fall with batch norm, on digits.

Cost: the time of ``landscape()`` in training steps, and the share of a run that it takes at one look in so many steps.
Measures: nets with and without batch norm, the same weights to begin with and the same batches, looked at every
``EVERY`` steps; of each measure, in how many pairs of looks the net with batch norm has the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.probes import Landscape, landscape
from batchnorm.study import data, models
from batchnorm.study.execution import tensors
from benchmarks.harness import interleave, options, save, show

LOSS = nn.CrossEntropyLoss()
BATCH = 60
EVERY = 50
LATE = 200
# name: layers, activation, learning rate
NETS: dict[str, tuple[int, models.Activation, float]] = {
    "3 x 100 sigmoid": (3, "sigmoid", 1.0),
    "8 x 100 ReLU": (8, "relu", 0.1),
}
MEASURES = {
    "loss range": "width of the range of losses along the gradient",
    "gradient change": "largest change of the gradient along it",
    "smoothness": "effective beta",
    "shift": "||G - G'||, median over 4 layers",
    "1 - cosine": "of G and G', median over 4 layers",
}


def net(name: str, norm: models.Norm, seed: int) -> nn.Sequential:
    layers, activation, _ = NETS[name]
    return models.mlp(64, 10, seed=seed, layers=layers, norm=norm, activation=activation)


def costs() -> list[dict[str, Any]]:
    """A look in steps, and its share of a run."""
    torch.manual_seed(0)
    rows = []
    for name, (_, _, rate) in NETS.items():
        for norm in ("none", "batch"):
            model = net(name, norm, 0)
            x, y = torch.rand(BATCH, 64), torch.randint(10, (BATCH,))
            # What is timed must not change what is timed: no step of this length moves a weight.
            optimizer = torch.optim.SGD(model.parameters(), 1e-30)

            def step(model: nn.Module = model, x: Tensor = x, y: Tensor = y, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                optimizer.step()

            def look(model: nn.Module = model, x: Tensor = x, y: Tensor = y, rate: float = rate) -> Landscape:
                return landscape(model, (x, y), LOSS, learning_rate=rate)

            times = interleave({"step": step, "look": look}, rounds=5 if options.quick else 15, least=0.01)
            steps = times["look"].median / times["step"].median
            rows.append(
                {
                    "net": name,
                    "norm": norm,
                    "passes": look().forwards,
                    "a look, in steps": steps,
                    **{f"share at {every}": steps / (steps + every) for every in (20, EVERY, 100)},
                }
            )
    return rows


def looks(name: str, norm: models.Norm, seed: int, steps: int) -> Iterator[tuple[int, dict[str, float]]]:
    """The measures of a net while it learns."""
    rate = NETS[name][2]
    x, y = tensors(data.digits(seed).train)
    model = net(name, norm, seed)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        if step % EVERY == 0:
            yield step, measures(landscape(model, (x[chosen], y[chosen]), LOSS, learning_rate=rate))
        optimizer.zero_grad()
        LOSS(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def measures(found: Landscape) -> dict[str, float]:
    low, high = found.loss_range
    cosines = [1.0 - shift.cosine for shift in found.shifts if shift.cosine is not None]
    return {
        "loss range": high - low,
        "gradient change": found.gradient_range[1],
        "smoothness": found.smoothness or 0.0,
        "shift": median(shift.distance for shift in found.shifts),
        "1 - cosine": median(cosines) if cosines else math.inf,
    }


def falls() -> list[dict[str, Any]]:
    """Of each measure, in how many pairs it is smaller with batch norm, before step LATE and from there on."""
    seeds, steps = (2, 401) if options.quick else (3, 601)
    rows = []
    for name in NETS:
        pairs = [
            (step, plain, batch)
            for seed in range(seeds)
            for (step, plain), (_, batch) in zip(
                looks(name, "none", seed, steps), looks(name, "batch", seed, steps), strict=True
            )
        ]
        for measure in MEASURES:
            row: dict[str, Any] = {"net": name, "measure": measure}
            for when, kept in (
                (f"before {LATE}", [pair for pair in pairs if pair[0] < LATE]),
                (f"from {LATE} on", [pair for pair in pairs if pair[0] >= LATE]),
            ):
                fell = sum(batch[measure] < plain[measure] for _, plain, batch in kept)
                row[when] = f"{fell} of {len(kept)}"
                row[f"{when}: with / without"] = median(
                    batch[measure] / plain[measure] if plain[measure] else math.inf for _, plain, batch in kept
                )
            rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    cost = costs()
    show("a look at the landscape, in training steps, and its share of a run at one look in so many steps", cost)
    fell = falls()
    show("pairs of looks in which the measure is smaller with batch norm", fell)
    path = save("landscape", cost + fell, measures=MEASURES)
    if path:
        print(f"saved as {Path(path)}")


if __name__ == "__main__":
    main()
