"""Section ``deep``: the net that does not train without BN, and how deep nets may be without it and with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deep:
    """``layers`` x 100 sigmoid at each of ``lrs`` without BN, at ``lr`` with it; then nets of other depths.

    Without BN ``plain_depths`` at ``plain_lr``, about the best rate of three layers; begun with weights ``wide_init``
    times as large ``wide_depths`` at ``wide_lr``; with BN ``batch_depths`` at each of ``batch_lrs``. Nets that differ
    in depth end at 90%, or after ``depth_steps``.
    """

    layers: int = 6
    lrs: tuple[float, ...] = (1.0, 3.0)
    lr: float = 1.0
    steps: int = 500
    batch_steps: int = 200
    plain_depths: tuple[int, ...] = (2, 4)
    plain_lr: float = 2.0
    wide_init: float = 4.0
    wide_depths: tuple[int, ...] = (6, 8)
    wide_lr: float = 0.3
    batch_depths: tuple[int, ...] = (2, 20)
    batch_lrs: tuple[float, ...] = (0.3,)
    depth_steps: int = 800


QUICK = Deep(
    steps=300,
    batch_steps=100,
    plain_depths=(2, 4),
    wide_depths=(6,),
    batch_depths=(2, 12),
    depth_steps=300,
)
FULL = Deep(
    lrs=(0.3, 1.0, 3.0),
    steps=1500,
    batch_steps=500,
    plain_depths=(2, 3, 4, 5),
    wide_depths=(6, 8, 12),
    batch_depths=(2, 8, 20, 40),
    batch_lrs=(0.1, 0.3),
    depth_steps=1000,
)
