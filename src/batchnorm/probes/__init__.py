"""Watch a network, never alter it: how the inputs of its units are distributed, and how that moves."""

from batchnorm.probes.distribution import PERCENTILES, InputPercentiles
from batchnorm.probes.movement import movement, typical_unit

__all__ = ["PERCENTILES", "InputPercentiles", "movement", "typical_unit"]
