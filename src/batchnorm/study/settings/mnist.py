"""Section ``mnist``: the paper's experiment, its length, its rate and the deviation of its first weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mnist:
    """The paper's net on MNIST at each of ``lrs`` for ``steps``; the paper's 50,000 are ``--full``.

    The paper gives neither the rate nor the deviation of its "small random Gaussian values": a slow and a faster rate,
    and one deviation, were chosen here, once.
    """

    seeds: int = 3
    lrs: tuple[float, ...] = (0.1, 0.5)
    std: float = 0.1
    steps: int = 10000


QUICK = Mnist(lrs=(0.5,), steps=1000)
FULL = Mnist(steps=50000)
