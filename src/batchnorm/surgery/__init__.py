"""Change a model's normalization, never train it. What was done is told by :func:`changes`."""

from __future__ import annotations

from batchnorm.nn.recognition import frozen_parts
from batchnorm.surgery.adapt import adapt
from batchnorm.surgery.adapted import Adapted
from batchnorm.surgery.averaging import averaged_model
from batchnorm.surgery.changes import Change, Changes, changes
from batchnorm.surgery.convert import convert, revert
from batchnorm.surgery.fold import fold
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.insert import Normalized, insert
from batchnorm.surgery.recalibrate import recalibrate
from batchnorm.surgery.selection import select
from batchnorm.surgery.sortedness import SortedBatchesWarning

__all__ = [
    "Adapted",
    "Change",
    "Changes",
    "Normalized",
    "SortedBatchesWarning",
    "adapt",
    "averaged_model",
    "changes",
    "convert",
    "fold",
    "freeze",
    "frozen_parts",
    "insert",
    "recalibrate",
    "revert",
    "select",
    "unfreeze",
]
