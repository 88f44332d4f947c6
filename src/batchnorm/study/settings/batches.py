"""Section ``batches``: sizes of batches, batches of one class, and running averages that lag."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """Each normalization at each of ``sizes``, for the same number of ``steps``, all at the rate ``lr``.

    ``ghost`` is the size of a ghost batch within the study's batch, ``groups`` the number of group norm's groups.
    Batches of one class have the study's size and take ``class_steps`` at ``class_lr``: gradients of different classes
    follow each other instead of adding up, and the rate of shuffled batches is too fast for them. Running averages with
    each of ``momenta`` are looked at after each of the steps ``looks``, the last of which ends the run.
    """

    sizes: tuple[int, ...] = (2, 4, 8, 16, 60)
    lr: float = 0.1
    steps: int = 100
    ghost: int = 15
    groups: int = 10
    class_lr: float = 0.03
    class_steps: int = 100
    momenta: tuple[float, ...] = (0.1, 0.01, 0.001)
    looks: tuple[int, ...] = (20, 50, 100)


QUICK = Batches(sizes=(2, 60), steps=40, class_steps=40, momenta=(0.1, 0.01), looks=(20, 40))
FULL = Batches(steps=300, class_steps=300, looks=(20, 50, 100, 200, 400))
