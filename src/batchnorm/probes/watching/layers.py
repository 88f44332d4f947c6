"""Which modules of a model are watched, and what their kind says of dead and saturated units."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from batchnorm._errors import InputError
from batchnorm.nn.recognition import Layer, is_batch_norm, is_frozen

Predicate = Callable[[str, nn.Module], bool]
Selection = str | type[nn.Module] | nn.Module | Predicate
Layers = Selection | Iterable[Selection] | None
"""What ``layers=`` takes: names, patterns, types, modules, predicates; None is all batch norms."""

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WILD = frozenset("*?[")

Ends = tuple[float, float]


def chosen(model: nn.Module, layers: Layers) -> list[Layer]:
    """The layers of ``model`` that ``layers`` asks for, each module once, in the model's order.

    Names are those of the model itself: without what ``torch.compile`` and wrappers for checkpointing put into them.

    Raises:
        InputError: a name, pattern, type or predicate fits no module; the model has no batch norm and ``layers`` is
            None.
    """
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in path.split(".") if part not in _WRAPPED)
        # A wrapper and what it wraps have one name: the inner module comes later and is the one that is meant.
        if isinstance(module, torch.jit.ScriptModule):  # its layers run no hooks
            continue
        if name and any(getattr(module, part, None) is not None for part in _WRAPPED):
            continue
        names.setdefault(module, []).append(name)
    if layers is None:
        found = {module for module in names if is_batch_norm(module) or is_frozen(module)}
        if not found:
            raise InputError(
                f"expected a model with batch norm, got {type(model).__name__} without: name the layers to watch, "
                'as in layers=["fc1", torch.nn.ReLU]'
            )
    else:
        found = set()
        single = isinstance(layers, str | nn.Module) or callable(layers)
        for selection in [layers] if single else layers:  # type: ignore[union-attr]
            found |= _fitting(names, selection)  # type: ignore[arg-type]
        if not found:
            raise InputError("expected layers to watch, got an empty list: leave layers out for all batch norms")
    return [Layer(tuple(paths), module) for module, paths in names.items() if module in found]


def _fitting(names: dict[nn.Module, list[str]], selection: Selection) -> set[nn.Module]:
    if isinstance(selection, nn.Module):
        found, said = {selection} & names.keys(), f"{type(selection).__name__} given as a module"
    elif isinstance(selection, type):
        found, said = {module for module in names if isinstance(module, selection)}, f"type {selection.__name__}"
    elif isinstance(selection, str):
        found = {module for module, paths in names.items() if any(_matches(path, selection) for path in paths)}
        said = f"name {selection!r}"
    elif callable(selection):
        found = {module for module, paths in names.items() if any(selection(path, module) for path in paths)}
        said = f"predicate {getattr(selection, '__name__', selection)!r}"
    else:
        raise InputError(f"expected names, types, modules or predicates as layers, got {selection!r}")
    if not found:
        near: list[str] = []
        if isinstance(selection, str):
            near = difflib.get_close_matches(selection, [path for paths in names.values() for path in paths])
        advice = f"did you mean {' or '.join(map(repr, near))}?" if near else "see dict(model.named_modules())"
        raise InputError(f"expected layers of the model, got the {said}, which fits none: {advice}")
    return found


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or (not _WILD.isdisjoint(pattern) and fnmatchcase(path, pattern))


def is_rectifier(module: nn.Module) -> bool:
    """Whether its output is 0 wherever its input is not positive."""
    return isinstance(module, nn.ReLU | nn.ReLU6)


def flat_ends(module: nn.Module) -> Ends | None:
    """From which inputs on the function of ``module`` is flat, below and above; None where it has no two flat ends.

    For sigmoid and tanh, where the output is within 1% of its range from its end (the slope is then below 4% of the
    steepest); for their piecewise linear relatives, where the slope is 0.
    """
    if isinstance(module, nn.Sigmoid):
        return -_LOGIT, _LOGIT
    if isinstance(module, nn.Tanh):
        return -_LOGIT / 2, _LOGIT / 2
    if isinstance(module, nn.Hardsigmoid):
        return -3.0, 3.0
    if isinstance(module, nn.Hardtanh) and not is_rectifier(module):
        return float(module.min_val), float(module.max_val)
    return None


_LOGIT = 4.59511985013459  # log(0.99 / 0.01)


def rectifies(module: nn.Module) -> bool:
    """Whether it ends in a function with a range of zeros: as a rectifier, or a norm with one fused (ours, timm's)."""
    inside = getattr(module, "act", None)
    return (
        is_rectifier(module)
        or getattr(module, "activation", None) in ("relu", "hardswish")
        or (is_batch_norm(module) and isinstance(inside, nn.Module) and is_rectifier(inside))
    )
