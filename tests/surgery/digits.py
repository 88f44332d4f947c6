"""scikit-learn's digits, and the network of three hidden layers that the experiments on them use."""

from __future__ import annotations

import functools
import itertools

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1000 images and their labels to train on, 797 and theirs to test on."""
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x / 16, y, train_size=1000, stratify=y, random_state=0)
    x, test_x = torch.tensor(x, dtype=torch.float32), torch.tensor(test_x, dtype=torch.float32)
    return x, torch.tensor(y), test_x, torch.tensor(test_y)


def network(momentum: float = 0.1) -> nn.Sequential:
    """3 x 100 ReLU units, batch norm before each."""
    hidden = [
        (nn.Linear(i, o), nn.BatchNorm1d(o, momentum=momentum), nn.ReLU())
        for i, o in itertools.pairwise((64, 100, 100, 100))
    ]
    return nn.Sequential(*itertools.chain(*hidden), nn.Linear(100, 10))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the test images, in eval mode."""
    _, _, x, y = digits()
    return (model.eval()(x).argmax(1) == y).float().mean().item()
