"""Section ``cifar10``: the convnet, its rates and its length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cifar10:
    """A convnet of ``2 * 3`` convolutions on CIFAR-10 for ``steps``, at the best of ``lrs``."""

    seeds: int = 3
    width: int = 16
    depth: int = 2
    lrs: tuple[float, ...] = (0.1,)
    steps: int = 1500


QUICK = Cifar10(seeds=1, width=8, steps=200)
FULL = Cifar10(lrs=(0.03, 0.1, 0.3), steps=10000)
