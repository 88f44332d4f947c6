"""Section ``identity``: the spiral and the net that is to draw it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """What gamma and beta are for: an exact inverse, and a spiral that needs them."""

    lr: float = 2.0
    steps: int = 800
    turns: float = 1.5
    width: int = 16
    points: int = 1000
    grid: int = 41


QUICK = Identity(steps=500, turns=1.25)
FULL = Identity(steps=1200)
