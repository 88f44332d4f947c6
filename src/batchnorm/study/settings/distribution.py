"""Section ``distribution``: how long the input of the last hidden layer is looked at, and how often."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """The input of the last hidden layer while the net learns, looked at every ``every`` steps.

    The plain net leaves its plateau after some 500 steps. A study that ends before it divides by the small deviation of
    units that do nothing yet, and finds a movement several times as large.

    ``slow`` says whether the pair is run at ``slow_lr`` as well.
    """

    lr: float = 2.0
    slow: bool = True
    slow_lr: float = 0.3
    steps: int = 700
    every: int = 20
    noise_shift: float = 1.0
    noise_scale: float = 0.75


QUICK = Distribution(slow=False)
FULL = Distribution(steps=800)
