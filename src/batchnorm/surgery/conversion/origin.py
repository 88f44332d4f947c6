"""What a layer takes along when another takes its place, and what is remembered for the way back.

The new layer keeps, as plain data in its attribute ``_converted_from``, what it has no place for: the class, settings
that only that class has, tensors that it does not use. Everything else (tensors, hooks, children, attributes of a user,
mode) goes over as the same objects, so that the way back finds it as it is then. Copies and pickles of the model take
the memory along; a ``state_dict`` need not, as a model that was converted in the same way remembers the same.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.nn.sync import found_group, saved_group
from batchnorm.surgery.conversion.sources import Source

MEMORY = "_converted_from"
"""The attribute of a converted layer that holds what is remembered."""

COMPILED = "_compiled_call_impl"
"""Where ``module.compile()`` puts the compiled forward, which is of one module and no other."""

_KINDS = ("_parameters", "_buffers", "_modules")
_MODULE = frozenset(vars(nn.Module()))
_HOOKS = _MODULE - {*_KINDS, "training", "_non_persistent_buffers_set"}
_STANDARD = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Attributes that layers have by their classes: what else there is, a user put there.
_SETTINGS = frozenset(
    {
        *("num_features", "eps", "momentum", "affine", "track_running_stats", "process_group", "_agreed"),
        *("activation", "ddof", "on_single_value", "inference_weight"),
        *("virtual_batch_size", "r_max", "d_max", "warmup_steps", "num_groups", "num_channels"),
    }
)
# Settings that a user may change on the converted layer, and finds changed after the way back.
_SHARED = ("eps", "momentum", "track_running_stats", "activation", "ddof", "on_single_value", "inference_weight")


def was_converted(module: nn.Module) -> bool:
    """Whether ``module`` remembers what it was before."""
    return MEMORY in vars(module)


def take_over(source: Source, made: nn.Module, absorbed: bool) -> None:
    """Give ``made`` what the layer of ``source`` has besides its own kind of tensors, and let it remember the rest.

    Args:
        source: the layer that leaves.
        made: the one that takes its place, with the tensors that it uses in their places.
        absorbed: whether drop and act of the old layer are part of the operator of the new one.
    """
    old = source.layer
    state = vars(old) if "__getstate__" not in vars(source.base) else source.base.__getstate__(old)
    state = {name: value for name, value in state.items() if name not in _MODULE | {MEMORY, COMPILED}}
    own = {name for name in vars(made) if name not in _MODULE}
    users = {name: value for name, value in state.items() if name not in {*_SETTINGS, *own, *source.unkept}}
    vars(made).update(users)
    for name in ("weight", "bias"):
        # Parametrized, pruned or the like: made of others, by the class or by a hook.
        if name not in old._parameters and name not in old._buffers:
            made._parameters.pop(name, None)
    # Of another layer, children of these names are a user's.
    tail = {"drop", "act"} if absorbed and (source.drop is not None or source.act is not None) else set()
    for kind in _KINDS:
        there, here = getattr(old, kind), getattr(made, kind)
        here.update({name: thing for name, thing in there.items() if name not in {*_STANDARD, *here, *tail}})
    made._non_persistent_buffers_set |= old._non_persistent_buffers_set & set(made._buffers)
    _hand_on(old, made)
    _parametrize_as(old, made)
    vars(made)[MEMORY] = {
        "class": _address(source_class(old)),
        "training": old.training,
        "settings": {name: saved_group(value) for name, value in state.items() if name not in users},
        "given": {name: getattr(made, name) for name in _SHARED if name in vars(made)},
        "order": {kind: list(getattr(old, kind)) for kind in _KINDS},
        "aside": {kind: _difference(getattr(old, kind), getattr(made, kind)) for kind in _KINDS},
        "own": {
            "": sorted(own),
            **{kind: list(_difference(getattr(made, kind), getattr(old, kind))) for kind in _KINDS},
        },
        "transient": sorted(old._non_persistent_buffers_set),
        "like": _like(made),
    }


def source_class(layer: nn.Module) -> type[nn.Module]:
    """The class to go back to, without what a parametrization put in front."""
    return parametrize.type_before_parametrizations(layer) if parametrize.is_parametrized(layer) else type(layer)


def restored(layer: nn.Module, elsewhere: Set[Tensor]) -> tuple[nn.Module, list[str]]:
    """The layer that a converted one was, with what has become of tensors and settings since, and what is lost.

    Args:
        layer: a converted one; it is left as it is.
        elsewhere: parameters that other modules of the model use, and which therefore are up to date.
    """
    memory: dict[str, Any] = vars(layer)[MEMORY]
    kind = _found(memory["class"])
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    own = {*memory["own"][""], MEMORY}
    users = {name: value for name, value in vars(layer).items() if name not in _MODULE | own | {COMPILED}}
    made.__setstate__({name: _bound(found_group(value), made) for name, value in memory["settings"].items()} | users)
    lost: list[str] = []
    for name, given in memory["given"].items():
        now = getattr(layer, name, given)
        if now is given or now == given:
            continue
        if name in vars(made):
            setattr(made, name, now)
        else:
            lost.append(f"{name}={now!r}")
    for group in _KINDS:
        live = {n: thing for n, thing in getattr(layer, group).items() if n not in memory["own"][group]}
        aside = memory["aside"][group]
        there = {}
        for name in memory["order"][group]:
            if name in live:
                there[name] = live.pop(name)
            elif name in aside:
                there[name] = _refreshed(aside[name], name, layer, memory["like"], elsewhere)
        there.update(live)
        getattr(made, group).update(there)
    made.training = layer.training
    if layer.training != memory["training"]:
        for module in memory["aside"]["_modules"].values():
            module.train(layer.training)
    aside = set(memory["aside"]["_buffers"])
    made._non_persistent_buffers_set = {
        *(name for name in layer._non_persistent_buffers_set if name in made._buffers and name not in aside),
        *(name for name in memory["transient"] if name in aside),
    }
    _hand_on(layer, made)
    _parametrize_as(layer, made)
    if any(name.startswith("running_") and tensor is not None for name, tensor in memory["aside"]["_buffers"].items()):
        lost.append("running statistics are those from before it was converted: recalibrate")
    return made, lost


def _difference(those: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    return {name: thing for name, thing in those.items() if name not in others or others[name] is not thing}


def _hand_on(old: nn.Module, made: nn.Module) -> None:
    """Hooks, in the very dictionaries that their handles know."""
    for name in _HOOKS:
        if name in vars(old):
            vars(made)[name] = vars(old)[name]
    hooks: dict[int, Any] = vars(made)["_load_state_dict_pre_hooks"]
    for key, hook in hooks.items():
        if getattr(hook, "with_module", False):  # it holds on to the module
            hooks[key] = type(hook)(hook.hook, made)


def _parametrize_as(old: nn.Module, made: nn.Module) -> None:
    """Put the class in front that computes the parametrized tensors of ``old``."""
    if parametrize.is_parametrized(old):
        ways = {name: value for name, value in vars(type(old)).items() if name not in ("__dict__", "__weakref__")}
        made.__class__ = type(f"Parametrized{type(made).__name__}", (type(made),), ways)


def _bound(value: Any, made: nn.Module) -> Any:
    """A method of the layer that left as one of the layer that is back."""
    if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, made)
    return value


def _like(layer: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Where a layer is and in what precision, by its first tensor of real numbers."""
    tensors = (tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.is_floating_point())
    first = next(tensors, None)
    return None if first is None else (first.device, first.dtype)


@torch.no_grad()
def _refreshed(thing: Any, name: str, layer: nn.Module, before: Any, elsewhere: Set[Tensor]) -> Any:
    """What was put aside, as it would be had it gone through what the converted layer went through."""
    if not isinstance(thing, Tensor) or thing in elsewhere:
        return thing
    value: Tensor | None = layer._parameters.get(name)
    if value is None:
        value = layer._buffers.get(name)  # gamma of a frozen layer: the other kind of tensor with the same meaning
    if value is None:
        now = _like(layer)
        if now is None or now == before:
            return thing
        value = thing.to(now[0], now[1] if thing.is_floating_point() else thing.dtype)
    if thing.is_meta != value.is_meta:
        return nn.Parameter(value.detach(), thing.requires_grad) if isinstance(thing, nn.Parameter) else value.detach()
    if (thing.device, thing.dtype) == (value.device, value.dtype):
        thing.copy_(value)
    else:
        thing.data = value.detach()
    return thing


def _address(kind: type[nn.Module]) -> str | type[nn.Module]:
    """Where ``kind`` is found again, so that a pickle need not import it; itself where it is at no such place."""
    address = f"{kind.__module__}:{kind.__qualname__}"
    try:
        return address if _found(address) is kind else kind
    except (ImportError, AttributeError):
        return kind


def _found(address: str | type[nn.Module]) -> type[nn.Module]:
    if isinstance(address, type):
        return address
    module, _, path = address.partition(":")
    found: Any = importlib.import_module(module)
    for step in path.split("."):
        found = getattr(found, step)
    assert isinstance(found, type)
    return found
