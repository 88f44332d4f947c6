"""Section ``headline``: how long each of its parts runs, and at which rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
    """Steps to 90% with and without BN. ``lrs`` is the grid over which the baseline is tuned, on validation.

    The grid leaves out what ``conservative_lr`` measures by itself; the lengths are such that both nets of the tuned
    pair have passed 95% well before their end (``FULL`` goes on, for the best accuracy they come to).
    """

    seeds: int = 5
    lrs: tuple[float, ...] = (1.0, 2.0, 4.0)
    tune_steps: int = 1200
    steps: int = 1300
    batch_steps: int = 300
    conservative_lr: float = 0.3
    conservative_steps: int = 2500
    wide_init: float = 4.0
    wide_steps: int = 300
    wide_lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    relu_lrs: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6)
    counter_steps: int = 400
    hot_factor: float = 30.0
    hot_steps: int = 200


QUICK = Headline(
    seeds=3,
    lrs=(1.0, 2.0, 4.0),
    steps=1100,
    batch_steps=300,
    tune_steps=900,
    conservative_steps=1600,
    wide_steps=200,
    wide_lrs=(0.5, 1.0),
    relu_lrs=(0.2, 0.4),
    hot_steps=100,
)
FULL = Headline(
    lrs=(0.3, 1.0, 2.0, 3.0, 4.0, 5.0),
    tune_steps=1500,
    steps=2000,
    batch_steps=1000,
    wide_steps=500,
    wide_lrs=(0.2, 0.5, 1.0, 2.0),
)
