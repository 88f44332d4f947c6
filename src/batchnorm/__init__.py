"""batchnorm: normalization for PyTorch, from the raw data to every layer of the network.

The rooms, each importable as an attribute of this package and loaded when it is first used:

- ``batchnorm.preprocessing``: centre, scale and whiten data (scikit-learn estimators),
- ``batchnorm.nn``: batch-normalization layers, drop-in for ``torch.nn``'s,
- ``batchnorm.ops``: the arithmetic of the layers as ``torch.library`` operators,
- ``batchnorm.moments``: counts, means and sums of squared deviations that merge exactly,
- ``batchnorm.probes``: how activations are distributed, how that moves during training, and what is wrong with a model,
- ``batchnorm.surgery``: change a model's normalization: convert, insert, freeze, recalibrate, fold, adapt,
- ``batchnorm.study``, ``batchnorm.report``: experiments that show what normalization does, and their page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batchnorm._errors import (
    BatchnormError,
    CheckpointError,
    ConfigError,
    DtypeError,
    InputError,
    MissingDependencyError,
    OutputError,
    RecordsError,
    ShapeError,
    StatisticsFileError,
    SurgeryError,
    SynchronizationError,
)

if TYPE_CHECKING:
    from batchnorm import moments, nn, ops, preprocessing, probes, report, study, surgery
    from batchnorm.probes import diagnose, watch
    from batchnorm.study.comparison.api import compare

    # From their modules, of the same names: in a cycle of imports a type checker takes the room's names for these.
    from batchnorm.surgery.adapt import adapt
    from batchnorm.surgery.changes import changes
    from batchnorm.surgery.convert import convert, revert
    from batchnorm.surgery.fold import fold
    from batchnorm.surgery.freeze import freeze, unfreeze
    from batchnorm.surgery.insert import insert
    from batchnorm.surgery.recalibrate import recalibrate

__version__ = "0.1.0"

__all__ = [
    "BatchnormError",
    "CheckpointError",
    "ConfigError",
    "DtypeError",
    "InputError",
    "MissingDependencyError",
    "OutputError",
    "RecordsError",
    "ShapeError",
    "StatisticsFileError",
    "SurgeryError",
    "SynchronizationError",
    "__version__",
    "adapt",
    "changes",
    "compare",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "insert",
    "moments",
    "nn",
    "ops",
    "preprocessing",
    "probes",
    "recalibrate",
    "report",
    "revert",
    "study",
    "surgery",
    "unfreeze",
    "watch",
]

_ROOMS = frozenset({"moments", "nn", "ops", "preprocessing", "probes", "report", "study", "surgery"})
_FUNCTIONS = {
    "adapt": "surgery",
    "changes": "surgery",
    "compare": "study.comparison",
    "convert": "surgery",
    "diagnose": "probes",
    "fold": "surgery",
    "freeze": "surgery",
    "insert": "surgery",
    "recalibrate": "surgery",
    "revert": "surgery",
    "unfreeze": "surgery",
    "watch": "probes",
}


def __getattr__(name: str) -> Any:
    # Rooms load on first use: `import batchnorm` must cost next to nothing, whatever the rooms come to need.
    if name in _ROOMS:
        return importlib.import_module(f"batchnorm.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"batchnorm.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
