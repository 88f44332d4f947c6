"""Section ``deep``: depth, rates and steps of the net that does not train without BN."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deep:
    """The net that does not train without BN: ``layers`` x 100 sigmoid, at each of ``lrs``."""

    layers: int = 6
    lrs: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    lr: float = 1.0
    steps: int = 2000
    batch_steps: int = 500
    wide_init: float = 4.0
    wide_layers: int = 8
    wide_lr: float = 0.3


QUICK = Deep(lrs=(1.0, 3.0), steps=500, batch_steps=150, wide_layers=6)
FULL = Deep()
