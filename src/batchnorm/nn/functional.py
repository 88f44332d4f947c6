"""Functional forms of the layers: the same arithmetic without the state."""

from __future__ import annotations

from batchnorm.ops.functional import batch_norm

__all__ = ["batch_norm"]
