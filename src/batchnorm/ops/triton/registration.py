"""Registers the kernels for CUDA, where they outrank the reference. Imports no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchnorm import _gpu
from batchnorm.ops.registration import IMPLEMENTATIONS
from batchnorm.ops.schema import NAMESPACE

_HERE = "batchnorm.ops.triton."
MODULES = dict.fromkeys(IMPLEMENTATIONS, _HERE + "forward")
MODULES |= dict.fromkeys(
    ("grad_sums", "grad_input", "train_backward", "train_step_backward", "ghost_backward"), _HERE + "backward"
)
MODULES |= dict.fromkeys(("update_running", "ghost_update"), _HERE + "averages")
"""Where an operator's kernel is launched."""


# Kept for the life of the process: a Library that is collected takes its registrations with it.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _route(name: str) -> Callable[..., Any]:
    module = MODULES[name]
    # x tells what kind of data an operator gets; of the gradients it is the second argument. Averages are of any type.
    position = 1 if module.endswith("backward") else 0
    dtypes = None if module.endswith("averages") else _gpu.DTYPES
    return _gpu.routed(module, name, IMPLEMENTATIONS[name], position, dtypes)


ROUTES = {name: _route(name) for name in IMPLEMENTATIONS}
"""By operator: what CUDA tensors get."""

_gpu.try_first(_HERE + "trial")
for _name, _implementation in ROUTES.items():
    _gpu.register(_library, _name, _implementation)
