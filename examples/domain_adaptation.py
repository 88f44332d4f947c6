"""Domain adaptation on scikit-learn's embedded data: what it brings to match statistics, and where it does harm.

    python examples/domain_adaptation.py [--seeds 5] [--weight 10]

A model learns from a labelled source domain and is tested on a target domain, of which it may see the samples but not
the labels. Printed is the accuracy there, mean and deviation over seeds. The shifts:

    nuclei            the mean of each measurement over a tumour's nuclei -> the worst of them (breast_cancer); other
                      patients in each domain
    order of file     first half of the digits -> second half; the file is not shuffled
    lighting          digits -> other digits, each image under a light of its own (synthetic: brightness and gradient)
    classes           digits -> other digits, of which 5 to 9 are ten times rarer; nothing else is different
    lighting, classes both

and the ways to adapt:

    none                train on the source as it is
    mean, std           train on the source with each feature's mean and deviation moved to the target's
    CORAL               train on the source aligned with the target
    CORAL, paper's      the same as in the paper: each domain standardized, then the identity added to both covariances
    CORAL, weighted     fitted with weights that give the source the target's proportions of classes, which somebody
                        must know
    reversed            train on the source as it is; test on the target aligned with the source
    reversed, weighted  likewise
    Deep CORAL          train on the source as it is, with the CORAL loss on the hidden activations (network only)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import batchnorm as bn
from batchnorm.preprocessing import CORAL, StandardScaler

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
STEPS = 100


class Task(NamedTuple):
    """Two domains; ``truth``, the target's labels, are for the score alone."""

    source: Floats
    labels: Labels
    target: Floats
    truth: Labels


def halves(x: Floats, y: Labels, seed: int) -> Task:
    """Two domains without a shift."""
    source, target, labels, truth = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
    return Task(source, labels, target, truth)


def digits() -> tuple[Floats, Labels]:
    """8 x 8 pixels in [0, 1]."""
    data = load_digits()
    return data.data / 16, data.target


def nuclei(seed: int) -> Task:
    """Features 0 to 9 are means, 20 to 29 the worst values of the same ten measurements."""
    data = load_breast_cancer()
    task = halves(data.data, data.target, seed)
    scaler = StandardScaler().fit(task.source[:, :10])
    return task._replace(source=scaler.transform(task.source[:, :10]), target=scaler.transform(task.target[:, 20:]))


def order_of_file(seed: int) -> Task:
    """Nine tenths of each half of the file."""
    x, y = digits()
    rng, rows = np.random.default_rng(seed), np.arange(len(x))
    first, second = (rng.choice(half, len(half) * 9 // 10, replace=False) for half in np.array_split(rows, 2))
    return Task(x[first], y[first], x[second], y[second])


def lighting(seed: int) -> Task:
    """Add brightness and a gradient in both directions to each target image, each with deviation 1/2."""
    task, rng = halves(*digits(), seed), np.random.default_rng(seed)
    slope = np.linspace(-1, 1, 8)
    patterns = np.stack([np.ones((8, 8)), np.tile(slope, (8, 1)), np.tile(slope, (8, 1)).T]).reshape(3, 64)
    return task._replace(target=task.target + rng.normal(0, 0.5, (len(task.target), 3)) @ patterns)


def classes(seed: int) -> Task:
    """Of the target's digits 5 to 9 one in ten is left."""
    return _rarer(halves(*digits(), seed), seed)


def lighting_and_classes(seed: int) -> Task:
    """Both."""
    return _rarer(lighting(seed), seed)


def _rarer(task: Task, seed: int) -> Task:
    kept = (task.truth < 5) | (np.random.default_rng(seed).random(len(task.truth)) < 0.1)
    return task._replace(target=task.target[kept], truth=task.truth[kept])


SHIFTS: dict[str, Callable[[int], Task]] = {
    "nuclei": nuclei,
    "order of file": order_of_file,
    "lighting": lighting,
    "classes": classes,
    "lighting, classes": lighting_and_classes,
}

# A way to adapt gives what to train on and what to test on.
Way = Callable[[Task], tuple[Floats, Floats]]


def mean_and_std(task: Task) -> tuple[Floats, Floats]:
    """``(x - mean_s) / std_s * std_t + mean_t``"""
    standardized = StandardScaler().fit_transform(task.source)
    return StandardScaler().fit(task.target).inverse_transform(standardized), task.target


def papers(task: Task) -> tuple[Floats, Floats]:
    """CORAL on features that are standardized in each domain, with the identity added to both covariances."""
    source, target = (StandardScaler().fit_transform(x) for x in (task.source, task.target))
    return CORAL(regularization=1.0, match_mean=False).fit(source, target).transform(source), target


def proportions(task: Task) -> Floats:
    """A weight for each source sample, such that classes count as they do in the target."""
    in_source, in_target = (np.bincount(y, minlength=10) for y in (task.labels, task.truth))
    return in_target[task.labels] / in_source[task.labels]


def weighted(task: Task) -> tuple[Floats, Floats]:
    """CORAL between domains of the same proportions."""
    fitted = CORAL().fit(task.source, task.target, sample_weight=proportions(task))
    return fitted.transform(task.source), task.target


def reversed_weighted(task: Task) -> tuple[Floats, Floats]:
    """The target aligned with a source of the same proportions."""
    fitted = CORAL().fit(task.target, task.source, target_weight=proportions(task))
    return task.source, fitted.transform(task.target)


WAYS: dict[str, Way] = {
    "none": lambda task: (task.source, task.target),
    "mean, std": mean_and_std,
    "CORAL": lambda task: (CORAL().fit_transform(task.source, task.target), task.target),
    "CORAL, paper's": papers,
    "CORAL, weighted": weighted,
    "reversed": lambda task: (task.source, CORAL().fit_transform(task.target, task.source)),
    "reversed, weighted": reversed_weighted,
}
LEARNERS = ("linear", "5-NN", "network")


def network(task: Task, train: Floats, test: Floats, seed: int, weight: float = 0.0) -> float:
    """The accuracy of a perceptron with 100 hidden units; ``weight`` is that of the CORAL loss on them."""
    torch.manual_seed(seed)
    source, target, tested = (torch.tensor(x, dtype=torch.float32) for x in (train, task.target, test))
    labels = torch.tensor(task.labels)
    hidden = nn.Sequential(nn.Linear(source.shape[1], 100), nn.ReLU())
    head = nn.Linear(100, int(labels.max()) + 1)
    optimizer = torch.optim.Adam([*hidden.parameters(), *head.parameters()], lr=0.01)
    for _ in range(STEPS):
        some, others = torch.randint(len(source), (128,)), torch.randint(len(target), (128,))
        activations = hidden(source[some])
        loss = nn.functional.cross_entropy(head(activations), labels[some])
        if weight:
            loss = loss + weight * bn.nn.coral_loss(activations, hidden(target[others]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((head(hidden(tested)).argmax(1).numpy() == task.truth).mean())


def scores(shift: str, seed: int, weight: float = 10.0) -> dict[tuple[str, str], float]:
    """The accuracy on the target, by way to adapt and learner."""
    task = SHIFTS[shift](seed)
    found: dict[tuple[str, str], float] = {}
    for name, way in WAYS.items():
        train, test = way(task)
        for learner, model in (("linear", LogisticRegression(max_iter=1000)), ("5-NN", KNeighborsClassifier(5))):
            found[name, learner] = float(model.fit(train, task.labels).score(test, task.truth))
        found[name, "network"] = network(task, train, test, seed)
    found["Deep CORAL", "network"] = network(task, task.source, task.target, seed, weight)
    return found


def main(arguments: list[str] | None = None) -> dict[tuple[str, str, str], Floats]:
    """Print the table; the accuracies by shift, way and learner, one a seed."""
    parser = argparse.ArgumentParser(description="Accuracy on a target domain, by way to adapt.")
    parser.add_argument("--seeds", type=int, default=5, help="how many splits and initializations (default 5)")
    parser.add_argument("--weight", type=float, default=10.0, help="of the CORAL loss in the network's (default 10)")
    options = parser.parse_args(arguments)
    print(f"{'shift':<19}{'adaptation':<20}" + "".join(f"{learner:<16}" for learner in LEARNERS).rstrip())
    table: dict[tuple[str, str, str], Floats] = {}
    for shift in SHIFTS:
        runs = [scores(shift, seed, options.weight) for seed in range(options.seeds)]
        for way in (*WAYS, "Deep CORAL"):
            cells = []
            for learner in LEARNERS:
                values = np.array([run[way, learner] for run in runs if (way, learner) in run])
                if len(values):
                    table[shift, way, learner] = values
                cells.append(f"{values.mean():.3f} +- {values.std():.3f}" if len(values) else "-")
            print(f"{shift:<19}{way:<20}" + "".join(f"{cell:<16}" for cell in cells).rstrip())
        print()
    return table


if __name__ == "__main__":
    main()
