"""Watch a network, never alter it: how the inputs of its units are distributed, how that moves, and what is wrong."""

from batchnorm.probes.distribution import PERCENTILES, InputPercentiles
from batchnorm.probes.health import Diagnosis, Finding, diagnose, rules
from batchnorm.probes.movement import movement, typical_unit

__all__ = [
    "PERCENTILES",
    "Diagnosis",
    "Finding",
    "InputPercentiles",
    "diagnose",
    "movement",
    "rules",
    "typical_unit",
]
