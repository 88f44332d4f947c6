"""Watch a network, never alter it: how the inputs of its units are distributed, how that moves, and what is wrong."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batchnorm.probes.distribution import PERCENTILES, InputPercentiles
from batchnorm.probes.landscape import Landscape, landscape
from batchnorm.probes.movement import chance, distances, movement, typical_unit, wasserstein
from batchnorm.probes.shift import shift

if TYPE_CHECKING:
    from batchnorm.probes.health import Diagnosis, Finding, diagnose, rules
    from batchnorm.probes.watching import Watch, load_records, watch

__all__ = [
    "PERCENTILES",
    "Diagnosis",
    "Finding",
    "InputPercentiles",
    "Landscape",
    "Watch",
    "chance",
    "diagnose",
    "distances",
    "landscape",
    "load_records",
    "movement",
    "rules",
    "shift",
    "typical_unit",
    "wasserstein",
    "watch",
]

# What needs torch to be imported loads on first use: the report reads records without it.
_HOMES = {
    **dict.fromkeys(("Diagnosis", "Finding", "diagnose", "rules"), "health"),
    **dict.fromkeys(("Watch", "load_records", "watch"), "watching"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"batchnorm.probes.{_HOMES[name]}"), name)
    if name == "lightning":  # the callbacks: their import takes seconds
        return importlib.import_module("batchnorm.probes.lightning")
    raise AttributeError(f"module 'batchnorm.probes' has no attribute {name!r}")
