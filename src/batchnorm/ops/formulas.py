"""Every operator in plain torch under its own name, wherever it is written: a stand-in for ``torch.ops.batchnorm``."""

from __future__ import annotations

from types import SimpleNamespace

from batchnorm.ops import ghost, reference
from batchnorm.ops.schema import SCHEMAS

FORMULAS = SimpleNamespace(**{name: getattr(ghost if hasattr(ghost, name) else reference, name) for name in SCHEMAS})
