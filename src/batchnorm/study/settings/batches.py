"""Section ``batches``: sizes of batches, batches of one class, and running averages that lag."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm._errors import ConfigError

WIDTH, TRAINED_ON = 100, 1000
"""Units in a layer and training samples, which bound what can be asked for."""


@dataclass(frozen=True)
class Batches:
    """Each normalization at each of ``sizes``, for the same number of ``steps``, all at the rate ``lr``.

    ``ghost`` is the size of a ghost batch within the study's batch, ``groups`` the number of group norm's groups.
    Batches of one class have the study's size and take ``class_steps`` at ``class_lr``: gradients of different classes
    follow each other instead of adding up, and the rate of shuffled batches is too fast for them. Running averages with
    each of ``momenta`` are looked at after each of the steps ``looks``, the last of which ends the run.

    Raises:
        ConfigError: a size that BN or the data cannot serve, or groups of unequal size.
    """

    sizes: tuple[int, ...] = (2, 4, 16, 60)
    lr: float = 0.1
    steps: int = 100
    ghost: int = 15
    groups: int = 10
    class_lr: float = 0.03
    class_steps: int = 100
    momenta: tuple[float, ...] = (0.1, 0.01, 0.001)
    looks: tuple[int, ...] = (20, 50, 100)

    def __post_init__(self) -> None:
        """Refuse what no run could train on."""
        for size in self.sizes:
            if not 2 <= size <= TRAINED_ON:
                raise ConfigError(
                    f"expected batches.sizes from 2 (BN has no variance of one sample) to {TRAINED_ON}, got {size}"
                )
        if self.groups < 1 or WIDTH % self.groups:
            raise ConfigError(f"expected batches.groups that divide {WIDTH} units, got {self.groups}")


QUICK = Batches(sizes=(2, 60), steps=40, class_steps=40, momenta=(0.1, 0.01), looks=(20, 40))
FULL = Batches(sizes=(2, 4, 8, 16, 60), steps=300, class_steps=300, looks=(20, 50, 100, 200, 400))
