"""The arithmetic of a batch-normalization layer: one schema, several implementations.

Importing this room registers the operators ``torch.ops.batchnorm.*`` (see :mod:`batchnorm.ops.schema`) and loads the
C++ library where there is one. :func:`batchnorm.ops.native.status` tells which implementation runs.
"""

from __future__ import annotations

from batchnorm.ops import functional, native, reference, registration, schema, selftest

native.status()

__all__ = ["functional", "native", "reference", "registration", "schema", "selftest"]
