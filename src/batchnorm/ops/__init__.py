"""The arithmetic of a batch-normalization layer: one schema, several implementations.

Importing this room registers the operators ``torch.ops.batchnorm.*`` (see :mod:`batchnorm.ops.schema`) and loads the
C++ library where there is one. :func:`batchnorm.ops.native.status` tells which implementation runs. The kernels for
GPUs (:mod:`batchnorm.ops.triton`) load with the first tensor that is on one.
"""

from __future__ import annotations

from batchnorm._library import load
from batchnorm.ops import functional, native, reference, registration, schema, selftest
from batchnorm.ops.triton import registration as _registered_for_cuda  # noqa: F401

load()

__all__ = ["functional", "native", "reference", "registration", "schema", "selftest"]
