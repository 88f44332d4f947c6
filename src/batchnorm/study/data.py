"""The study's data: all of it ships with scikit-learn or is made here, so that nothing is fetched.

Splits are stratified and drawn anew for each seed. Arrays are float64; the network gets them as float32 once they are
preprocessed, so that no preprocessing suffers from the rounding of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Train, validation and test parts: ``(n, d)`` features and ``(n,)`` labels of each."""

    train: tuple[Floats, Labels]
    validation: tuple[Floats, Labels]
    test: tuple[Floats, Labels]
    classes: int

    @property
    def features(self) -> int:
        """The width d."""
        return int(self.train[0].shape[1])


# Sizes of the training and validation parts; the rest is test.
DIGITS = (1000, 300)
BREAST_CANCER = (341, 114)


def digits(seed: int, scale: float = 16.0) -> Split:
    """The 1797 handwritten 8x8 digits: 1000 train, 300 validation, 497 test; pixels (0 to 16) divided by ``scale``."""
    features, labels = _load("load_digits")
    return _split(features / scale, labels, DIGITS, seed)


def breast_cancer(seed: int) -> Split:
    """The 569 cases of the Wisconsin breast cancer data, 30 raw features of very different scale: 341, 114, 114."""
    features, labels = _load("load_breast_cancer")
    return _split(features, labels, BREAST_CANCER, seed)


def spiral(seed: int, points: int = 1000, noise: float = 0.02, turns: float = 1.5) -> Split:
    """Two interleaved arms of a spiral in the plane, radius 0 to 1, with Gaussian ``noise``; half train, half held out.

    Arm k in {0, 1}: radius r = sqrt(u), u uniform on (0, 1); angle 2 pi turns r + pi k; point r (cos, sin) + noise.
    """
    rng = np.random.default_rng([seed, 7])
    labels = np.arange(points, dtype=np.int64) % 2
    radius = np.sqrt(rng.uniform(0.0, 1.0, points))
    angle = 2.0 * np.pi * turns * radius + np.pi * labels
    plane = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return _split(plane + noise * rng.standard_normal((points, 2)), labels, (points // 2, points // 4), seed)


@lru_cache(maxsize=4)
def _load(name: str) -> tuple[Floats, Labels]:
    from sklearn import datasets

    bunch: Any = getattr(datasets, name)()
    return np.asarray(bunch.data, dtype=np.float64), np.asarray(bunch.target, dtype=np.int64)


def _split(features: Floats, labels: Labels, sizes: tuple[int, int], seed: int) -> Split:
    from sklearn.model_selection import train_test_split

    train, validation = sizes
    places = np.arange(len(labels))
    first, rest = train_test_split(places, train_size=train, stratify=labels, random_state=seed)
    second, third = train_test_split(rest, train_size=validation, stratify=labels[rest], random_state=seed)

    def part(chosen: NDArray[np.intp]) -> tuple[Floats, Labels]:
        return features[chosen], labels[chosen]

    return Split(part(first), part(second), part(third), int(labels.max()) + 1)
