"""Section ``whitening``: which whitening layers are trained beside BN, and at which rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Whitening:
    """3 x 100 units with BN, and with whitening in groups of each of ``groups`` by Newton's iteration and eigenvalues.

    Sigmoid at ``sigmoid_lrs`` and ReLU at ``relu_lrs``, each until 95% or ``steps``. The groups of ``eigen_groups`` are
    whitened by eigenvalues too.
    """

    groups: tuple[int, ...] = (4, 20)
    eigen_groups: tuple[int, ...] = (4,)
    sigmoid_lrs: tuple[float, ...] = (2.0,)
    relu_lrs: tuple[float, ...] = (0.1,)
    steps: int = 100


QUICK = Whitening(groups=(4,), eigen_groups=(4,), steps=40)
FULL = Whitening(
    groups=(2, 4, 20),
    eigen_groups=(4, 20),
    sigmoid_lrs=(1.0, 2.0),
    relu_lrs=(0.1,),
    steps=160,
)
