"""What a recalibration costs and how right it is, beside fvcore's ``update_bn_stats`` and torch's ``update_bn``.

One pass of each over the same batches, in one run. The errors are those of the running statistics against float64
statistics of all that each batch norm was given: of means in deviations, of variances relative, the largest of all
channels and layers. There is no dropout in the networks, and ``method="sequential"`` is for the record: it takes a pass
for each batch norm of the chain.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import batchnorm as bn
from batchnorm.nn.recognition import batch_norms
from benchmarks.harness import interleave, options, save, show


def perceptron() -> nn.Sequential:
    """The paper's: 3 x 100 sigmoid units."""
    widths = (64, 100, 100, 100)
    hidden = [[nn.Linear(i, o), nn.BatchNorm1d(o), nn.Sigmoid()] for i, o in itertools.pairwise(widths)]
    return nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(100, 10))


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def residual() -> nn.Sequential:
    """Nine batch norms, 16 to 64 channels."""
    stages = [
        layer
        for i, o in ((16, 16), (16, 32), (32, 64))
        for layer in (nn.Conv2d(i, o, 1 if i == o else 2, stride=1 if i == o else 2), nn.BatchNorm2d(o), Residual(o))
    ]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def batches(shape: tuple[int, ...], sizes: Sequence[int]) -> list[Tensor]:
    """Not centred, and with a drift from batch to batch."""
    x = torch.randn(sum(sizes), *shape) + 3
    x += torch.linspace(-1, 1, len(x)).reshape(-1, *[1] * len(shape))
    return list(x.split(list(sizes)))


def fvcore_update(model: nn.Module, data: list[Tensor]) -> None:
    from fvcore.nn.precise_bn import update_bn_stats

    update_bn_stats(model, data, num_iters=len(data))


PEERS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "fvcore": fvcore_update,
    "torch": lambda model, data: update_bn(data, model),
    "ours": bn.recalibrate,
}
CASES = {
    "3 x 100, 17 x 60": (perceptron, (64,), [60] * 17),
    "3 x 100, ragged": (perceptron, (64,), [60] * 16 + [7]),
    "residual, 4 x 32": (residual, (3, 24, 24), [32] * 4),
    "residual, ragged": (residual, (3, 24, 24), [32] * 3 + [5]),
}


@torch.no_grad()
def right(model: nn.Module, data: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of what each batch norm is given, all in float64, batch statistics upstream."""
    twin = copy.deepcopy(model).double().train()
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in batch_norms(twin)}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs: seen[name].append(inputs[0].movedim(1, -1).flatten(0, -2))

    for layer in batch_norms(twin):
        layer.module.register_forward_pre_hook(keep(layer.name))
    for batch in data:
        twin(batch.double())
    rows = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: (values.mean(0), values.var(0)) for name, values in rows.items()}


def errors(model: nn.Module, truth: dict[str, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Of means in deviations, of variances relative."""
    means, variances = [0.0], [0.0]
    for layer in batch_norms(model):
        mean, var = truth[layer.name]
        found: Any = layer.module
        means.append(float(((found.running_mean.double() - mean).abs() / var.sqrt()).max()))
        variances.append(float((found.running_var.double() / var - 1).abs().max()))
    return max(means), max(variances)


def main() -> None:
    """Measure, show and save."""
    torch.set_num_threads(1)  # the networks are small, and what is compared is the work beside theirs
    rows = []
    for name, (make, shape, sizes) in CASES.items():
        torch.manual_seed(0)
        model, data = make().train(), batches(shape, sizes)
        truth = right(model, data)
        models = {peer: copy.deepcopy(model) for peer in PEERS}
        calls = {peer: functools.partial(PEERS[peer], models[peer], data) for peer in PEERS}
        calls["ours, sequential"] = functools.partial(bn.recalibrate, copy.deepcopy(model), data, method="sequential")
        times = interleave(calls, rounds=5 if options.quick else 11, least=0.02)
        for who, timing in times.items():
            mean, var = errors(models[who], truth) if who in models else (None, None)
            rows.append(
                {
                    "case": name,
                    "who": who,
                    "seconds": dataclasses.asdict(timing),
                    "time, of fvcore's": timing.median / times["fvcore"].median,
                    "error of means": mean,
                    "error of variances": var,
                }
            )
    save("recalibrate", rows)
    show("recalibration", [{k: v for k, v in row.items() if k != "seconds"} for row in rows])


if __name__ == "__main__":
    main()
