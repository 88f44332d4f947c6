"""Which layers of a model an operation is for: by name, glob, type or predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn

from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.recognition import Layer, is_batch_norm, is_frozen, unwrapped

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Layers: TypeAlias = str | type[nn.Module] | Iterable[str | type[nn.Module]] | Predicate
"""How layers are chosen, see :func:`select`."""


def select(
    model: nn.Module,
    layers: Layers | None = None,
    frozen: bool = False,
    among: Callable[[nn.Module], bool] | None = None,
    called: str = "a batch norm",
) -> list[Layer]:
    """The batch norms of ``model`` that ``layers`` chooses, each once, in the order of ``named_modules``.

    Args:
        model: any module.
        layers: None for all; a name as ``named_modules`` gives it, where that of a module which holds batch norms
            stands for all of them; a glob such as ``"layer4.*.bn?"``, whose ``*`` matches dots too; a class; several of
            these; or a predicate of name and module. A shared layer has several names, and is chosen if one of them is.
            The prefix of a parallel wrapper or of ``torch.compile`` may be left out.
        frozen: with True, layers that are constant by their class can be chosen too.
        among: which modules can be chosen, where that is not the batch norms.
        called: what such a module is, for messages.

    Raises:
        InputError: (ValueError) a name or glob that finds nothing; ``layers`` is none of the above. Classes and
            predicates may find nothing.
        SurgeryError: (ValueError, RuntimeError) all are wanted, and some are in a ScriptModule.
    """
    if among is None:
        among = _batch_norm_or_frozen if frozen else is_batch_norm
    candidates = _held(model, among)
    if layers is None:
        _refuse_scripts(model)
        return candidates
    if callable(layers) and not isinstance(layers, type | nn.Module):
        return [layer for layer in candidates if any(layers(name, layer.module) for name in layer.names)]
    chosen: set[nn.Module] = set()
    for wanted in _several(layers):
        chosen.update(layer.module for layer in _matching(model, wanted, candidates, called))
    return [layer for layer in candidates if layer.module in chosen]


def _held(model: nn.Module, among: Callable[[nn.Module], bool]) -> list[Layer]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if among(module):
            names.setdefault(module, []).append(name)
    return [Layer(tuple(found), module) for module, found in names.items()]


def _refuse_scripts(model: nn.Module) -> None:
    """What is scripted has no layers of Python to change: better said than passed by."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            continue
        # Inside a model of Python only what normalizes matters: freezing a script inlines what it was.
        counts = "running_mean" in dict(module.named_buffers(recurse=False))
        if not name or (counts and "InstanceNorm" not in module.original_name):
            raise SurgeryError(
                f"expected modules of Python, got the scripted {module.original_name} at {name!r}: script it "
                "afterwards, or choose others by layers="
            )


def _batch_norm_or_frozen(module: nn.Module) -> bool:
    return is_batch_norm(module) or is_frozen(module)


def _several(layers: Any) -> Sequence[Any]:
    if isinstance(layers, str | type):
        return (layers,)
    if isinstance(layers, Iterable) and not isinstance(layers, nn.Module):
        return tuple(layers)
    raise InputError(
        f"expected layers to be names, globs, classes of modules or a predicate of name and module, got {layers!r}"
    )


def _matching(model: nn.Module, wanted: Any, candidates: list[Layer], called: str) -> list[Layer]:
    if isinstance(wanted, type) and issubclass(wanted, nn.Module):
        return [layer for layer in candidates if isinstance(layer.module, wanted)]
    if not isinstance(wanted, str):
        raise InputError(f"expected the name, glob or class of layers, got {wanted!r}")
    prefix = unwrapped(model)[1]
    is_glob = any(sign in wanted for sign in "*?[")

    def matches(name: str) -> bool:
        for known in {name, name.removeprefix(prefix)}:
            if (is_glob and fnmatchcase(known, wanted)) or known == wanted:
                return True
            if not is_glob and (not wanted or known.startswith(wanted + ".")):
                return True
        return False

    found = [layer for layer in candidates if any(matches(name) for name in layer.names)]
    if not found:
        raise InputError(_nothing_at(model, wanted, prefix, candidates, called))
    return found


def _nothing_at(model: nn.Module, wanted: str, prefix: str, candidates: list[Layer], called: str) -> str:
    modules = dict(model.named_modules(remove_duplicate=False))
    there = modules.get(wanted, modules.get(prefix + wanted))
    if there is not None:
        return f"expected {called} at or below {wanted!r}, got {type(there).__name__}"
    names = [name.removeprefix(prefix) for layer in candidates for name in layer.names]
    close = difflib.get_close_matches(wanted, names, n=3) or names[:3]
    hint = f"is it {', '.join(repr(name) for name in close)}?" if close else "the model has none"
    return f"expected the name or glob of {called}, got {wanted!r}, which none has: {hint}"
