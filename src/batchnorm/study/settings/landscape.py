"""Section ``landscape``: the nets whose loss is looked at along the gradient."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Landscape:
    """Three pairs of nets, without BN and with it at one rate, looked at every ``every`` steps.

    ``layers`` x 100 sigmoid at ``sigmoid_lr`` for ``sigmoid_steps``, which a plain net needs to leave chance;
    ``layers`` and ``deep_layers`` x 100 ReLU at ``relu_lr`` for ``relu_steps``. At each look ``shifts`` layers are
    asked how much the step of those before them changes their gradient.
    """

    layers: int = 3
    deep_layers: int = 8
    sigmoid_lr: float = 2.0
    sigmoid_steps: int = 480
    relu_lr: float = 0.1
    relu_steps: int = 200
    every: int = 20
    shifts: int = 3


QUICK = Landscape(sigmoid_steps=100, relu_steps=50)
FULL = Landscape(sigmoid_steps=1200, relu_steps=500)
