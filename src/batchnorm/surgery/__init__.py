"""Change a model's normalization, never train it. What was done is told by :func:`changes`."""

from __future__ import annotations

from batchnorm.surgery.changes import Change, Changes, changes

__all__ = ["Change", "Changes", "changes"]
