"""Freeze batch norms, so that ``model.train()`` does not thaw them, and give back exactly what was there before."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.outside import NormOutsideGradient
from batchnorm.nn.recognition import FROZEN, Layer, frozen_parts
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.selection import Layers, select
from batchnorm.surgery.transaction import unchanged_on_error

_FROZEN = {
    "affine": "gamma and beta no longer learn",
    "update": "the running statistics no longer move",
    "use": "normalizes with its running statistics in training too",
}
_THAWED = {
    "affine": "gamma and beta require a gradient as before",
    "update": "the running statistics move again",
    "use": "normalizes with its batch in training again",
}


def freeze(
    model: nn.Module,
    layers: Layers | None = None,
    *,
    affine: bool = True,
    update: bool = True,
    use: bool = True,
) -> nn.Module:
    """Freeze batch norms in place: torch's, ours and subclasses such as timm's ``BatchNormAct2d``.

    Three things can be frozen, each by itself:

    - ``affine``: gamma and beta require no gradient. Their ``.grad`` is dropped, so that an optimizer skips them, with
      weight decay and momentum.
    - ``update``: running mean, running variance and the counter stay as they are.
    - ``use``: in training too the layer computes ``y = gamma (x - running_mean) / sqrt(running_var + eps) + beta``.

    With all three, the default, a layer is a constant. Without ``use`` it goes on normalizing with its batch. Without
    ``update`` it normalizes in training with running statistics that have just moved for the batch; it then runs twice,
    and what it computes first is thrown away.

    Classes, Parameter objects, keys of the ``state_dict``, momentum and counters stay what they are, and
    ``model.train()`` thaws nothing. Copies, pickles and compiled, exported or checkpointed models are frozen as well.
    What still thaws is to set ``requires_grad`` or a layer's ``training`` by hand; the update is frozen even then, and
    freezing again mends it. (A module is told to train by a call of its ``train``, and the layer gets one of its own
    that says no. The update is torch's ``track_running_stats``, as in Lightning.)

    Args:
        model: changed in place.
        layers: which, see :func:`batchnorm.surgery.select`; None for all.
        affine, update, use: what to freeze. What is frozen already stays frozen.

    Returns:
        ``model``. ``bn.changes(model)`` says what was done; :func:`unfreeze` undoes it.

    Raises:
        InputError: (ValueError) nothing is to be frozen, or ``layers`` finds nothing.
        SurgeryError: (ValueError, RuntimeError) a layer has no running statistics to use, has not seen its first batch
            (lazy layers), or moves them whatever it is told; gamma and beta are inside DistributedDataParallel, which
            has taken note of what learns: freeze before you wrap. The model is as it was.
    """
    wanted = _wanted(affine, update, use)
    chosen = [(layer, wanted - _effective(layer.module)) for layer in select(model, layers)]
    for layer, parts in chosen:
        _check(layer, parts | frozen_parts(layer.module))
    _check_wrapping(model, any("affine" in parts and _parameters(layer.module) for layer, parts in chosen), "freeze")
    learnt = _remembered(model)
    before = {
        layer.module: {name: learnt.get(kept, kept.requires_grad) for name, kept in _parameters(layer.module).items()}
        for layer, _ in chosen
    }
    found: list[Change] = []
    waiting: list[nn.Parameter] = []
    with unchanged_on_error(model):
        for layer, parts in chosen:
            module, holder = layer.module, _holder(model, layer)
            memory: dict[str, Any] = dict(module.__dict__.get(FROZEN, {}))
            if "affine" in parts:
                memory.setdefault("affine", before[module])
            if "update" in parts:
                memory.setdefault("update", module.track_running_stats)
            if "use" in parts:
                apart = holder is not None and holder.training != module.training
                memory.setdefault("use", {"training": module.training, "apart": apart})
            _settle(module, memory, holder)
            moved = {name: kept for name, kept in _parameters(module).items() if kept.grad is not None}
            if "affine" not in memory:
                moved = {}
            waiting += moved.values()
            if parts:
                lost = f"the gradient of {' and '.join(moved)}" if moved else ""
                found.append(Change(layer.name, _told(parts, _FROZEN), lost))
    for parameter in waiting:
        parameter.grad = None  # or an optimizer would go on by it
    remember(model, "freeze", found)
    return model


def unfreeze(
    model: nn.Module,
    layers: Layers | None = None,
    *,
    affine: bool = True,
    update: bool = True,
    use: bool = True,
) -> nn.Module:
    """Undo :func:`freeze`, of all layers or some, wholly or in part, in place.

    gamma and beta require a gradient where they did before, the update is as it was (torch's ``track_running_stats``),
    and the layer is in the mode of the module that holds it, or in its own where it had one of its own. Momentum, the
    counter and the class never were anything else. What is not frozen, or constant by its class, is left alone.

    Args:
        model, layers: as for :func:`freeze`.
        affine, update, use: what to thaw.

    Returns:
        ``model``. ``bn.changes(model)`` says what was thawed, and is empty where nothing was.

    Raises:
        InputError, SurgeryError: as :func:`freeze`.
    """
    wanted = _wanted(affine, update, use)
    chosen = [(layer, wanted & frozen_parts(layer.module)) for layer in select(model, layers)]
    _check_wrapping(model, any("affine" in parts and _parameters(layer.module) for layer, parts in chosen), "unfreeze")
    found: list[Change] = []
    with unchanged_on_error(model):
        thawed: list[tuple[Tensor, bool]] = []
        for layer, parts in chosen:
            if not parts:
                continue
            module = layer.module
            memory = dict(module.__dict__[FROZEN])
            for part in parts:
                value = memory.pop(part)
                if part == "affine":
                    kept = _parameters(module)
                    thawed += [(kept[name], learns) for name, learns in value.items() if name in kept]
                elif part == "update":
                    module.__dict__["track_running_stats"] = value
            _settle(module, memory, _holder(model, layer))
            found.append(Change(layer.name, _told(parts, _THAWED)))
        still = _remembered(model)  # a Parameter may be another layer's too
        for parameter, learns in thawed:
            if parameter not in still:
                parameter.requires_grad_(learns)
    remember(model, "unfreeze", found)
    return model


class _Held:
    """A layer's own ``train``: the layer stays in eval. An attribute that pickles, unlike a function made for it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, mode: bool = True) -> nn.Module:
        """Leave the layer in eval; what it holds (an activation, a dropout) goes into ``mode``."""
        for child in self.layer.children():
            child.train(mode)
        return self.layer


def _by_running(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
) -> Any:  # a hook: None leaves the output as it is
    """In the place of what a training forward gave, which has moved the averages: what eval gives."""
    if not module.training:
        return None
    buffers = dict(module._buffers)
    module.training = False
    try:
        # torch's backward reads the statistics again, which another forward may have moved by then: it gets copies.
        # A graph of torch.compile has its own.
        if not torch.compiler.is_compiling():
            module._buffers.update({name: None if kept is None else kept.clone() for name, kept in buffers.items()})
        return module.forward(*args, **kwargs)
    finally:
        module.training = True
        if not torch.compiler.is_compiling():
            module._buffers.update(buffers)


def _settle(module: nn.Module, memory: dict[str, Any], holder: nn.Module | None) -> None:
    """Make the layer as frozen as ``memory`` says, and keep that in it."""
    was_held = isinstance(module.__dict__.get("train"), _Held)
    held = "use" in memory and "update" in memory
    kept = module.__dict__.get(FROZEN, {})
    if was_held and not held:
        del module.__dict__["train"]
        mode = kept["use"]
        module.training = mode["training"] if mode["apart"] or holder is None else holder.training
    elif held:
        module.training = False
        module.__dict__.setdefault("train", _Held(module))
    _set_hook(module, "use" in memory and not held)
    if "update" in memory:
        module.__dict__["track_running_stats"] = False
    if "affine" in memory:
        for parameter in _parameters(module).values():
            parameter.requires_grad_(False)
    if memory:
        module.__dict__[FROZEN] = memory
    else:
        module.__dict__.pop(FROZEN, None)


def _set_hook(module: nn.Module, wanted: bool) -> None:
    present = [key for key, hook in module._forward_hooks.items() if hook is _by_running]
    if wanted == bool(present):
        return
    if wanted:
        module.register_forward_hook(_by_running, prepend=True, with_kwargs=True)  # other hooks see what comes out
    for key in present:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what it compiled would go on without: it does not look for new hooks


def _effective(module: nn.Module) -> frozenset[str]:
    """What is frozen and was not thawed by hand."""
    thawed = {
        "affine": any(parameter.requires_grad for parameter in _parameters(module).values()),
        "update": bool(module.track_running_stats),
        "use": module.training and isinstance(module.__dict__.get("train"), _Held),
    }
    return frozenset(part for part in frozen_parts(module) if not thawed[part])


def _wanted(affine: bool, update: bool, use: bool) -> frozenset[str]:
    asked = {"affine": affine, "update": update, "use": use}
    for name, value in asked.items():
        if not isinstance(value, bool):
            raise InputError(f"expected {name} to be True or False, got {value!r}")
    if not any(asked.values()):
        raise InputError("expected at least one of affine, update and use to be True, got none")
    return frozenset(name for name, value in asked.items() if value)


def _check(layer: Layer, parts: frozenset[str]) -> None:
    module = layer.module
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise SurgeryError(f"{layer.name}: expected a layer that knows its channels, got a lazy one: run a batch first")
    if "use" in parts and module._buffers.get("running_mean") is None:
        raise SurgeryError(
            f"{layer.name}: expected running statistics to use, got a layer without: freeze it with use=False"
        )
    if "update" in parts and "use" not in parts and isinstance(module, NormOutsideGradient):
        raise SurgeryError(
            f"{layer.name}: expected a layer that can leave its statistics alone in training, got "
            f"{type(module).__name__}: freeze it with use=True"
        )


def _check_wrapping(model: nn.Module, affects_parameters: bool, operation: str) -> None:
    if not affects_parameters:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise SurgeryError(
                f"{name or 'the model'}: expected a model outside of DistributedDataParallel, which has taken note of "
                f"what learns: {operation} before you wrap it, or with affine=False"
            )


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """gamma and beta, or what they are computed from; not those of an activation that the layer holds."""
    places = ("weight", "bias")
    return {
        name: parameter
        for name, parameter in layer.named_parameters()
        if name in places or name.startswith(tuple(f"parametrizations.{place}." for place in places))
    }


def _remembered(model: nn.Module) -> dict[Tensor, bool]:
    """Of every frozen gamma and beta in ``model``, whether it required a gradient before."""
    found: dict[Tensor, bool] = {}
    for module in model.modules():
        kept = module.__dict__.get(FROZEN, {}).get("affine", {})
        for name, parameter in _parameters(module).items() if kept else ():
            if name in kept:
                found[parameter] = kept[name]
    return found


def _holder(model: nn.Module, layer: Layer) -> nn.Module | None:
    """The module that holds the layer; None where it is the model itself."""
    return model.get_submodule(layer.name.rpartition(".")[0]) if layer.name else None


def _told(parts: frozenset[str], words: dict[str, str]) -> str:
    return "; ".join(told for part, told in words.items() if part in parts)
