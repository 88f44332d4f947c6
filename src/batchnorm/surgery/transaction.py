"""A model stays as it was where an operation on it fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def unchanged_on_error(model: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Give ``model`` everything back that it had, whatever ends the block early.

    That is: which modules, parameters, buffers and hooks are where (the same objects), attributes, modes, what requires
    a gradient, and the values of buffers.

    Args:
        model: the root.
        parameters: keep a copy of the parameters' values too; for operations that write to them.
    """
    held = {module: (type(module), _contents(module)) for module in model.modules()}
    kept: list[Tensor] = [*model.buffers(), *(model.parameters() if parameters else ())]
    # Those of a lazy module that has seen no input have no values yet.
    values = [(tensor, tensor.detach().clone()) for tensor in kept if not is_lazy(tensor)]
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, (kind, contents) in held.items():
            module.__class__ = kind  # a parametrization changes it
            _restore(module, contents)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, learns in frozen.items():
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    # Dictionaries of a module (children, tensors, hooks) are copied one level deep: what they hold stays itself.
    return {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, contents: dict[str, Any]) -> None:
    current = module.__dict__
    for name in set(current) - set(contents):
        del current[name]
    for name, value in contents.items():
        now = current.get(name)
        # In place where it can be: handles of hooks hold the dictionary itself.
        if isinstance(value, dict) and isinstance(now, dict):
            now.clear()
            now.update(value)
        else:
            current[name] = value
