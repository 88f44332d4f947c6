"""Section ``convnet``: the two nets, their rates and steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Convnet:
    """A convnet of two convolutions and one of ``2 * deep_depth``, each at the best of its rates, for ``steps``.

    The deep one is half as wide: it is to show depth, not to take its time.
    """

    width: int = 16
    lrs: tuple[float, ...] = (0.3,)
    deep_width: int = 8
    deep_depth: int = 3
    deep_lrs: tuple[float, ...] = (0.1,)
    steps: int = 300


QUICK = Convnet(width=8, steps=120, deep_depth=2)
FULL = Convnet(lrs=(0.1, 0.3), deep_lrs=(0.1, 0.3), steps=400)
