"""Section ``preprocessing``: rates and steps of the table, the linear model and the deep net."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """Raw, centred, standardized, rotated and whitened inputs."""

    table_lrs: tuple[float, ...] = (0.1, 1.0, 10.0)
    table_steps: int = 150
    linear_lrs: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 50.0)
    linear_steps: int = 150
    deep_lr: float = 1.0
    deep_steps: int = 800


QUICK = Preprocessing(table_lrs=(0.1, 1.0), linear_lrs=(2.0, 10.0, 20.0, 50.0), linear_steps=80, deep_steps=500)
FULL = Preprocessing(
    linear_lrs=(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0), table_lrs=(0.1, 0.3, 1.0, 3.0, 10.0), deep_steps=1000
)
