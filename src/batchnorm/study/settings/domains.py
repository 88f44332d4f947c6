"""Section ``domains``: how test images are changed, and what the adaptations are given."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm._errors import ConfigError

TARGET = 300
"""The unlabelled images that adaptations see: the validation part."""


@dataclass(frozen=True)
class Domains:
    """Two nets trained for ``steps`` at the rate ``lr``, and asked about images that were changed.

    ``brightness`` is added to every pixel (0 to 1), ``contrast`` multiplies it, ``noise`` is the deviation of Gaussian
    noise. Adaptations see the validation part, changed likewise and without labels, or only ``few`` images of it
    (``draws`` times, other ones each). ``tent_lr`` is Adam's rate in TENT.

    Raises:
        ConfigError: statistics of fewer than 2 images, or of more than there are.
    """

    lr: float = 0.1
    steps: int = 500
    brightness: float = 0.5
    contrast: float = 0.3
    noise: float = 0.3
    few: int = 16
    draws: int = 5
    tent_lr: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what has no variance, and what cannot be drawn."""
        if not 2 <= self.few <= TARGET:
            raise ConfigError(f"expected domains.few from 2 to {TARGET} images, got {self.few}")


QUICK = Domains(steps=150, draws=1)
FULL = Domains(steps=2000, draws=20)
