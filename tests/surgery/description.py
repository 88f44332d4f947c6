"""All that can be told of a model, to compare before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

TENSORS = ("_parameters", "_buffers")
CORE = set(vars(nn.Module()))


def describe(model: nn.Module) -> dict[str, Any]:
    """Every path of every module with its class, tensors (objects and bits), hooks, mode and attributes.

    Objects are told by their ids. A module that is at several paths is told to be one.
    """
    told: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        told[name] = {
            "class": _class_of(module),
            "first path": next(path for path, other in model.named_modules() if other is module),
            "training": module.training,
            "children": list(module._modules),
            "hooks": {
                key: (id(value), [(number, _hook(hook)) for number, hook in value.items()])
                for key, value in vars(module).items()
                if key in CORE and key.endswith(("_hooks", "_kwargs", "_called")) and isinstance(value, dict)
            },
            "full": module._is_full_backward_hook,
            "transient": sorted(module._non_persistent_buffers_set),
            "attributes": {key: value for key, value in vars(module).items() if key not in CORE | {"_agreed"}},
            **{kind: [(key, _told(tensor)) for key, tensor in getattr(module, kind).items()] for kind in TENSORS},
        }
    told["keys"] = list(model.state_dict())
    return told


def _class_of(module: nn.Module) -> tuple[type, tuple[str, ...]]:
    if parametrize.is_parametrized(module):
        return parametrize.type_before_parametrizations(module), tuple(module.parametrizations)
    return type(module), ()


def _hook(hook: Any) -> Any:
    # torch wraps some together with their module.
    return getattr(hook, "hook", hook)


def _told(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return id(tensor), tensor.requires_grad, tensor.dtype, tensor.device, bits
