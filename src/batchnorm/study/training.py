"""The training loop of every run: plain SGD on mini-batches, evaluated at given steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Data = tuple[Tensor, Tensor]
_AT_ONCE = 1000
Watch = Callable[[int, float], bool]
"""Called with the step and the latest batch's loss at each evaluation; returns whether to stop."""


@dataclass(frozen=True)
class Trained:
    """How a run ended: after ``steps``, ``diverged`` if its loss was no number.

    ``step_seconds`` is the median processor time of a step: unlike wall time it does not grow when others compute here.
    """

    steps: int
    diverged: bool
    step_seconds: float


def train(
    model: nn.Module,
    data: Data,
    *,
    lr: float,
    steps: int,
    batch: int,
    seed: int,
    at: Container[int],
    watch: Watch,
    order: str = "shuffled",
) -> Trained:
    """Train ``model`` by SGD, ``theta <- theta - lr * gradient`` of the mean cross-entropy of a batch.

    Args:
        model: ``(N, d) -> (N, classes)``; left in train mode.
        data: features ``(n, d)`` and labels ``(n,)``.
        batch: size of a batch, at most n; the whole data where they are equal.
        seed: of the order of the samples, which thus is the same for every variant.
        at: steps after which ``watch`` is called (0 is before the first); step ``steps`` always is.
        order: which samples stand together in a batch, a key of :data:`ORDERS`.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    samples = ORDERS[order](data, batch, seed)
    seconds: list[float] = []
    loss = float("nan")
    model.train()
    if 0 in at and watch(0, loss):
        return Trained(0, False, 0.0)
    for step in range(1, steps + 1):
        x, target = next(samples)
        begun = time.thread_time()
        optimizer.zero_grad()
        objective = cross_entropy(model(x), target)
        objective.backward()
        optimizer.step()
        seconds.append(time.thread_time() - begun)
        if step in at or step == steps:
            loss = objective.item()
            diverged = not torch.isfinite(objective).item()
            if watch(step, loss) or diverged:
                return Trained(step, diverged, statistics.median(seconds))
    return Trained(steps, False, statistics.median(seconds))


def batches(data: Data, batch: int, seed: int) -> Iterator[Data]:
    """Batches without end: a fresh permutation for each epoch; a last part smaller than ``batch`` is left out."""
    features, labels = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        if batch == len(labels):
            yield data
            continue
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels) - batch + 1, batch):
            chosen = order[start : start + batch]
            yield features[chosen], labels[chosen]


def batches_of_one_class(data: Data, batch: int, seed: int) -> Iterator[Data]:
    """Batches without end, each of a single class: what reading a folder class by class gives, in random order.

    In each epoch a class's samples are permuted and cut; parts smaller than ``batch`` are left out, except where a
    class has no other. The parts of all classes come in random order.
    """
    features, labels = data
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    while True:
        parts: list[Tensor] = []
        for of_class in members:
            cut = of_class[torch.randperm(len(of_class), generator=generator)].split(batch)
            parts += [part for place, part in enumerate(cut) if place == 0 or len(part) == batch]
        for place in torch.randperm(len(parts), generator=generator).tolist():
            yield features[parts[place]], labels[parts[place]]


ORDERS: dict[str, Callable[[Data, int, int], Iterator[Data]]] = {
    "shuffled": batches,
    "one-class": batches_of_one_class,
}
"""How the samples of a batch are chosen: ``(data, batch, seed)`` to batches without end."""


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """The share of ``data`` that ``model`` classifies rightly in eval mode; leaves the model in train mode."""
    model.eval()
    features, labels = data
    # In parts: the activations of 10,000 images at once would take gigabytes.
    parts = zip(features.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
    right = sum(int((model(x).argmax(1) == target).sum()) for x, target in parts)
    model.train()
    return right / len(labels)


def evaluation_steps(total: int, fine_until: int = 200, fine: int = 2, coarse: int = 10) -> frozenset[int]:
    """Step 0, every ``fine`` steps to ``fine_until``, every ``coarse`` after it, and the last.

    A net with BN reaches 90% at about step 30, one without at about 650: both are resolved to a few per cent.
    """
    return frozenset([*range(0, min(total, fine_until) + 1, fine), *range(fine_until, total + 1, coarse), total])
