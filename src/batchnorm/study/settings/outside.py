"""Section ``outside``: the nets whose statistics count as constants, and those beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outside:
    """A bias that learns alone for ``toy_steps`` at ``toy_lr``; then nets for ``steps`` at each of ``lrs``.

    At the largest of ``lrs`` also: whitening in groups of ``group_size`` with statistics of every batch and of every
    ``interval`` batches, and a net whose input at each layer is whitened anew every ``interval`` steps while it
    computes the same, with ``damping`` and with ``small_damping`` added to each variance. Looked at every ``every``
    steps, which divides ``interval``.
    """

    toy_lr: float = 0.1
    toy_steps: int = 200
    lrs: tuple[float, ...] = (0.3, 1.0)
    steps: int = 100
    every: int = 20
    group_size: int = 20
    interval: int = 20
    damping: float = 0.1
    small_damping: float = 1e-5


QUICK = Outside(toy_steps=50, steps=20, every=10, interval=10)
FULL = Outside(toy_steps=500, lrs=(0.1, 0.3, 1.0), steps=200)
