"""Section ``initialisation``: the deviations of the first weights, the depths and the rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Initialisation:
    """Nets of each of ``layers`` begun with weights of each of ``stds``, at the best of ``lrs``, for ``steps``.

    Xavier's own deviation is about 0.1 here; 0.3 is where nets without normalization begin best.
    """

    seeds: int = 3
    layers: tuple[int, ...] = (3, 6)
    stds: tuple[float, ...] = (0.001, 0.3, 3.0)
    lrs: tuple[float, ...] = (1.0,)
    steps: int = 200


QUICK = Initialisation(layers=(3,), stds=(0.001, 0.3, 3.0), steps=150)
FULL = Initialisation(stds=(0.001, 0.01, 0.1, 0.3, 1.0, 3.0), lrs=(0.3, 1.0), steps=400)
