"""What adapting batch norms at test time brings on shifted digits, and what batches sorted by class do to it.

    python examples/test_time_adaptation.py            # about a minute; --seeds 1 for a quick look

A 3 x 100 ReLU network is trained on scikit-learn's 8x8 digits (the study's split: 1000 train, 497 test; batch 60, SGD
at 0.1, 600 steps), then asked about test images that were changed as a camera might: brighter, blurred, or of less
contrast. The statistics of the adapted ones are those of the present batch alone (episodic), of all batches since the
start, or of all there are, beforehand. The second table sorts a part of the samples by class, and shows what of that is
noticed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.study import data, training
from batchnorm.study.models import Norm, mlp

STEPS, RATE, BATCH = 600, 0.1, 60
TENT_RATE = 0.01
SORTED_PERCENT = (0, 20, 40, 60, 80, 100)
Data = tuple[Tensor, Tensor]


def blurred(x: Tensor) -> Tensor:
    """A 3x3 mean, with the border repeated."""
    padded = nn.functional.pad(x.reshape(-1, 1, 8, 8), (1, 1, 1, 1), mode="replicate")
    return nn.functional.avg_pool2d(padded, 3, stride=1).reshape(len(x), 64)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "brightness +.5": lambda x: x + 0.5,
    "blur": blurred,
    "contrast x.3": lambda x: 0.3 * x,
}


def trained(split: data.Split, norm: Norm, seed: int) -> nn.Module:
    """A network of the study, in eval mode."""
    model = mlp(split.features, split.classes, seed=seed, norm=norm, activation="relu")
    features, labels = split.train
    known = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    training.train(model, known, lr=RATE, steps=STEPS, batch=BATCH, seed=seed, at=frozenset(), watch=lambda *_: False)
    return model.eval()


def accuracy(model: nn.Module, tested: Data, order: Tensor, size: int) -> float:
    """Of batches of about ``size`` samples in this order."""
    features, labels = tested
    parts = order.tensor_split(len(order) // size)
    return sum(int((model(features[part]).argmax(1) == labels[part]).sum()) for part in parts) / len(labels)


def adapted(model: nn.Module, tested: Data, order: Tensor, size: int, **options: Any) -> tuple[float, float]:
    """The accuracy of ``model`` while it adapts, and how far its batches were found to be sorted; then it is reset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bn.surgery.SortedBatchesWarning)
        adapting = bn.adapt(model, **options)
        try:
            return accuracy(adapting, tested, order, size), adapting.sortedness.share
        finally:
            adapting.reset()


def beforehand(model: nn.Module, tested: Data, order: Tensor, asked: Tensor) -> float:
    """The accuracy of ``model`` adapted to all batches in the first order, asked in the second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bn.surgery.SortedBatchesWarning)
        done = bn.adapt(model, [tested[0][part] for part in order.tensor_split(len(order) // BATCH)])
    try:
        return accuracy(done, tested, asked, BATCH)
    finally:
        done.reset()


def sorted_in_part(labels: Tensor, share: float, seed: int) -> Tensor:
    """An order in which so large a share of the samples, drawn at random, is at the place of its class."""
    generator = torch.Generator().manual_seed(seed)
    chosen, place, other = torch.rand(3, len(labels), generator=generator, dtype=torch.float64)
    return torch.where(chosen < share, labels + place, 10 * other).argsort()


def scores(seed: int) -> dict[tuple[str, str], float]:
    """The accuracies, by shift and way."""
    split = data.digits(seed)
    plain, normalized = (trained(split, norm, seed) for norm in ("none", "batch"))
    labels = torch.tensor(split.test[1])
    shuffled, by_class = (sorted_in_part(labels, share, seed) for share in (0, 1))
    found: dict[tuple[str, str], float] = {}
    for shift, change in SHIFTS.items():
        tested = change(torch.tensor(split.test[0], dtype=torch.float32)), labels
        found[shift, "without batch norm"] = accuracy(plain, tested, shuffled, BATCH)
        found[shift, "not adapted"] = accuracy(normalized, tested, shuffled, BATCH)
        found[shift, "beforehand"] = beforehand(normalized, tested, shuffled, shuffled)
        ways: dict[str, tuple[Tensor, int, dict[str, Any]]] = {
            "each batch of 60": (shuffled, 60, {"episodic": True}),
            "each batch of 16": (shuffled, 16, {"episodic": True}),
            "  with prior=16": (shuffled, 16, {"episodic": True, "prior": 16}),
            "batches so far": (shuffled, 60, {}),
            "tent": (shuffled, 60, {"method": "tent", "lr": TENT_RATE}),
            "sorted: each of 60": (by_class, 60, {"episodic": True}),
            "sorted: so far": (by_class, 60, {}),
            "sorted: tent": (by_class, 60, {"method": "tent", "lr": TENT_RATE}),
        }
        for name, (order, size, options) in ways.items():
            found[shift, name], share = adapted(normalized, tested, order, size, **options)
            found[shift, f"share, {'sorted' if order is by_class else 'shuffled'}"] = share
        found[shift, "sorted: beforehand"] = beforehand(normalized, tested, by_class, shuffled)
    return found


def scores_by_sorting(seed: int) -> dict[tuple[str, str], float]:
    """How far brighter digits were found to be sorted, and the accuracy, by the share that was sorted."""
    split = data.digits(seed)
    model, labels = trained(split, "batch", seed), torch.tensor(split.test[1])
    tested = torch.tensor(split.test[0], dtype=torch.float32) + 0.5, labels
    found: dict[tuple[str, str], float] = {}
    for percent in SORTED_PERCENT:
        order = sorted_in_part(labels, percent / 100, seed)
        for size in (60, 16):
            result, share = adapted(model, tested, order, size, episodic=True)
            found[f"{percent}%", f"accuracy, {size}"], found[f"{percent}%", f"share, {size}"] = result, share
    return found


def main(arguments: list[str] | None = None) -> dict[tuple[str, str], float]:
    """Print both tables; their means over the seeds."""
    parser = argparse.ArgumentParser(description="Accuracy on shifted digits, by way to adapt.")
    parser.add_argument("--seeds", type=int, default=5, help="how many splits and initializations (default 5)")
    options = parser.parse_args(arguments)
    table: dict[tuple[str, str], float] = {}
    for run, columns in ((scores, list(SHIFTS)), (scores_by_sorting, [f"{percent}%" for percent in SORTED_PERCENT])):
        runs = [run(seed) for seed in range(options.seeds)]
        means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        print(f"{'':<20}" + "".join(f"{column:<16}" for column in columns).rstrip())
        for way in dict.fromkeys(way for _, way in means):
            print(f"{way:<20}" + "".join(f"{means[column, way]:<16.3f}" for column in columns).rstrip())
        print()
        table |= means
    return table


if __name__ == "__main__":
    main()
