"""A comparison of milliseconds: a small network, two classes apart, and a few steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import batchnorm as bn


def arrays(count: int = 200, features: int = 6, classes: int = 3) -> tuple[Any, Any]:
    """Gaussian clouds, one for each class, in order."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    return (rng.normal(0, 1, (count, features)) + 2.0 * labels[:, None]).astype(np.float32), labels


def make(norm: Any) -> nn.Module:
    """A network that takes its normalization."""
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 3))


def plain() -> nn.Module:
    """The same without one."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def loaders(batch_size: int = 16) -> list[Any]:
    """Three of them; the first shuffles."""
    features, labels = (torch.as_tensor(item) for item in arrays())
    parts = [slice(0, 120), slice(120, 160), slice(160, 200)]
    sets = [torch.utils.data.TensorDataset(features[part], labels[part]) for part in parts]
    return [
        torch.utils.data.DataLoader(part, batch_size=batch_size, shuffle=place == 0) for place, part in enumerate(sets)
    ]


def compare(model: Any = make, data: Any = None, **options: Any) -> Any:
    """A comparison of a few steps."""
    wanted = {"steps": 12, "lrs": [0.1], "seeds": 2, "batch_size": 16, "device": "cpu"} | options
    return bn.compare(model, arrays() if data is None else data, **wanted)


def measured(comparison: Any) -> list[dict[str, Any]]:
    """The records without times and memory, which are the machine's."""
    own = ("search", "measure")
    return [line for line in comparison.records if line["metric"] != "seconds" and line["section"] in own]
