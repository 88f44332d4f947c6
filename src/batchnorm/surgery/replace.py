"""Put modules in the places of others, wherever a model holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def replace(model: nn.Module, exchanged: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each value of ``exchanged`` where the model has its key, and return the root, which may be exchanged too.

    All paths of a shared module are found, and plain attributes, lists, tuples and dictionaries of its modules in
    which they keep it a second time.

    Args:
        model: the root.
        exchanged: old module to new one.
    """
    parents = [parent for parent in model.modules() if parent not in exchanged]
    for new in exchanged.values():  # which may have taken over children that are exchanged too
        parents += [parent for parent in new.modules() if parent not in exchanged]
    for parent in dict.fromkeys(parents):
        for name, child in parent._modules.items():
            if child is not None and child in exchanged:
                parent._modules[name] = exchanged[child]
        for name, value in vars(parent).items():
            if name not in _OWN:
                vars(parent)[name] = _renewed(value, exchanged)
    return exchanged.get(model, model)


_OWN = frozenset(vars(nn.Module()))  # a module's own dictionaries


def _renewed(value: Any, exchanged: Mapping[nn.Module, nn.Module]) -> Any:
    def new(item: Any) -> Any:
        return exchanged.get(item, item) if isinstance(item, nn.Module) else item

    if isinstance(value, nn.Module):
        return new(value)
    if isinstance(value, list):
        for place, item in enumerate(value):
            if new(item) is not item:
                value[place] = new(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if new(item) is not item:
                value[key] = new(item)
    elif type(value) is tuple and any(new(item) is not item for item in value):
        return tuple(new(item) for item in value)
    return value
