"""Change a model's normalization, never train it. What was done is told by :func:`changes`."""

from __future__ import annotations

from batchnorm.surgery.averaging import averaged_model
from batchnorm.surgery.changes import Change, Changes, changes
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.recalibrate import recalibrate

__all__ = [
    "Change",
    "Changes",
    "averaged_model",
    "changes",
    "freeze",
    "recalibrate",
    "unfreeze",
]
