"""Turn the batch norms of a model into layers of another kind, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, SurgeryError
from batchnorm.nn.recognition import Layer, frozen_parts, is_batch_norm, is_frozen, unwrapped
from batchnorm.surgery.changes import Change, remember
from batchnorm.surgery.conversion import origin, policies, sources
from batchnorm.surgery.conversion.optimizers import Exchange, Optimizers, mend, several
from batchnorm.surgery.conversion.policies import Maker
from batchnorm.surgery.replace import replace
from batchnorm.surgery.selection import Layers, select
from batchnorm.surgery.transaction import unchanged_on_error

# Wrappers that hold on to the modules or parameters inside.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


@torch.inference_mode(False)  # tensors that are made in it cannot be trained
def convert(
    model: nn.Module,
    to: str | type[nn.Module] | Maker,
    layers: Layers | None = None,
    *,
    optimizer: Optimizers | None = None,
    unknown: Literal["refuse", "skip", "base"] = "refuse",
    **options: Any,
) -> nn.Module:
    """Turn batch norms into layers of another kind, which keep all that the old ones had. See :func:`revert`.

    ==========  =============================================  ========================================================
    ``to``      becomes                                        computes, in eval and in training
    ==========  =============================================  ========================================================
    sync        bn.nn.SyncBatchNorm                            the same; the same for the batch of all processes
    ghost       bn.nn.GhostBatchNorm1d/2d/3d                   the same; ghosts of ``virtual_batch_size=`` (required)
    renorm      bn.nn.BatchRenorm1d/2d/3d                      the same; r and d up to ``r_max=``, ``d_max=``
    frozen      bn.nn.FrozenBatchNorm1d/2d/3d                  the same; as in eval
    ours        bn.nn's layer of the same kind                 the same
    torch       torch.nn's layer of the same kind              the same; plain for ghost, renorm and frozen
    group       torch.nn.GroupNorm                             other outputs; ``num_groups=`` (the largest divisor of C
                                                               up to 32)
    layer       torch.nn.GroupNorm of one group                other outputs
    instance    torch.nn.InstanceNorm1d/2d/3d                  other outputs
    ==========  =============================================  ========================================================

    Kept are the Parameters, and the buffers where the new layer has them, as the same objects; eps, momentum, counters,
    mode, hooks and their handles, parametrizations, children and attributes that a user added, a fused activation (our
    own, timm's), and that a shared layer is one layer. What is not kept is said in :func:`batchnorm.changes`. The keys
    of the ``state_dict`` stay where the new layer has the same tensors.

    A layer that was converted before is converted from what it was at first. One that already is what it is to become
    is left alone, as with "ours" every layer of this package. Layers that are constant by their class stay so, unless
    ``layers`` chooses them by more than the name of what holds them; "ours" makes torchvision's and detectron2's ours.

    Args:
        model: any module; changed in place, but for a root that is itself a batch norm.
        to: a name from the table; a class, made with the old settings (one that is no batch norm, group or instance
            norm: with C and ``options``) and given the tensors that it has; or a function of name and module that
            returns the new module, or None to leave the old one.
        layers: which ones, see :func:`batchnorm.surgery.selection.select`; None for all.
        optimizer: one or several, whose groups are mended. A frozen layer's gamma and beta are no parameters: they are
            taken out, and put back with their state by :func:`revert`. Other kinds keep their parameters and need none.
        unknown: what to do with a subclass that defines methods of its own, which the new layer would not have.
            "refuse", "skip" it, or treat it as the "base" that it stems from.
        **options: arguments of the new layer: ``virtual_batch_size``, ``r_max``, ``num_groups``, ``process_group``,
            ``activation``, ...

    Returns:
        ``model``, or the layer that took its place.

    Raises:
        SurgeryError: (ValueError, RuntimeError) a layer cannot be converted, or the model is scripted or wrapped for
            training on several devices. The message names it, and the model is as it was.
        InputError: (ValueError) an unknown ``to``, option or name of a layer.
    """
    if isinstance(to, str):
        check_choice("to", to, policies.TARGETS)
    elif not callable(to) or isinstance(to, nn.Module):
        raise InputError(f"expected to= as a name, a class or a function of name and module, got {to!r}")
    check_choice("unknown", unknown, ("refuse", "skip", "base"))
    optimizers = several(optimizer)
    _check(model)
    if isinstance(layers, Iterator):
        layers = tuple(layers)
    found = select(model, layers, frozen=layers is not None or to == "ours")
    if to != "ours":
        found = [layer for layer in found if not is_frozen(layer.module) or _is_named(layer, layers, model)]
    told: list[Change] = []
    exchanged: dict[nn.Module, nn.Module] = {}
    with unchanged_on_error(model):
        used = _users(model)
        for layer in found:
            made = _made(layer, to, unknown, options, _elsewhere(used, layer.module), told)
            if made is not None:
                exchanged[layer.module] = made
        root = _exchange(model, found, exchanged, optimizers)
    remember(root, "convert", told, before=model)
    return root


@torch.inference_mode(False)
def revert(model: nn.Module, layers: Layers | None = None, *, optimizer: Optimizers | None = None) -> nn.Module:
    """Turn what :func:`convert` made into what it was: class, activation, settings, rank, everything.

    Tensors, mode, hooks, attributes, and the eps or momentum that was set meanwhile, are those of the converted layer
    as it is now. What it did not use (running statistics of one that became a group norm) is as it was before.

    What a layer was is remembered in the layer. Deep copies and pickles of the model know it; a ``state_dict`` is
    loaded into a model that was converted in the same way, and that one is reverted.

    Args:
        model: with converted layers; changed in place, but for a root that is itself one.
        layers: which ones, see :func:`batchnorm.surgery.selection.select`; None for all.
        optimizer: one or several, that get back the parameters that :func:`convert` took out, in their groups, order
            and with their states.

    Returns:
        ``model``, or the layer that took its place.

    Raises:
        InputError: (ValueError) a layer, or with ``layers=None`` the whole model, was never converted.
        SurgeryError: (ValueError, RuntimeError) the model is wrapped for training on several devices, or nothing tells
            where in the optimizer parameters belong. The model is as it was.
    """
    optimizers = several(optimizer)
    _check(model)
    found = select(model, layers, among=origin.was_converted, called="a converted layer")
    if not found and layers is None:
        raise InputError("expected a model with layers that were converted, got none")
    told: list[Change] = []
    exchanged: dict[nn.Module, nn.Module] = {}
    with unchanged_on_error(model):
        used = _users(model)
        for layer in found:
            _check_thawed(layer)
            made, lost = origin.restored(layer.module, _elsewhere(used, layer.module))
            exchanged[layer.module] = made
            told.append(_change(layer, layer.module, made, lost))
        root = _exchange(model, found, exchanged, optimizers)
    remember(root, "revert", told, before=model)
    return root


def _made(
    found: Layer, to: Any, unknown: str, options: dict[str, Any], elsewhere: set[nn.Parameter], told: list[Change]
) -> nn.Module | None:
    """The layer that takes the place of ``found``, None where it stays; what was done is added to ``told``."""
    layer = found.module
    lost: list[str] = []
    is_function = not isinstance(to, str | type)
    if not is_function and _is_it(layer, to, options):
        return None
    _check_thawed(found)
    if origin.was_converted(layer):
        layer, lost = origin.restored(layer, elsewhere)
        if not is_function and _is_it(layer, to, options):
            told.append(_change(found, found.module, layer, lost))
            return layer
    source = sources.read(Layer(found.names, layer), "base" if is_function else unknown, anything=is_function)
    if source is None:
        return None
    if is_function:
        made, absorbed = to(found.name, layer), True
        if made is None or made is layer:
            return None
        if not isinstance(made, nn.Module) or layer in set(made.modules()):
            raise SurgeryError(
                f"expected a module that takes the place of {sources.where(found.name)}, got {_label(made)}"
                + (", which holds it" if isinstance(made, nn.Module) else "")
            )
        made.training = layer.training
    else:
        made, absorbed = policies.make(to, source, dict(options))
    lost += policies.lost(source, made)
    origin.take_over(source, made, absorbed)
    told.append(_change(found, found.module, made, lost, policies.note(to, made)))
    return made


def _check_thawed(found: Layer) -> None:
    if frozen_parts(found.module):
        raise SurgeryError(
            f"expected layers that are not held by freeze, got {type(found.module).__name__} at "
            f"{sources.where(found.name)}: unfreeze it first"
        )


def _is_it(layer: nn.Module, to: str | type[nn.Module], options: Mapping[str, Any]) -> bool:
    """Whether ``layer`` is already what it would become."""
    kind = sources.plain_class(layer)
    if to == "ours":
        return kind.__module__.partition(".")[0] == "batchnorm"
    if to == "torch":
        return kind.__module__ == nn.BatchNorm1d.__module__
    wanted = to if isinstance(to, type) else policies.classes(to)
    same = kind in wanted if isinstance(wanted, tuple) else kind is wanted
    return same and all(hasattr(layer, name) and getattr(layer, name) == value for name, value in options.items())


def _is_named(layer: Layer, layers: Any, model: nn.Module) -> bool:
    """Whether ``layers`` chooses it by its class, a predicate, its name or a glob, not only by what holds it."""
    if callable(layers):
        return True
    prefix = unwrapped(model)[1]
    names = {*layer.names, *(name.removeprefix(prefix) for name in layer.names)}
    for wanted in (layers,) if isinstance(layers, str) else layers:
        if isinstance(wanted, type):
            if isinstance(layer.module, wanted):
                return True
        elif any(fnmatchcase(name, wanted) for name in names):
            return True
    return False


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(
                f"expected modules of Python, got the scripted {module.original_name} at {sources.where(name)}: script "
                "it afterwards"
            )
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise SurgeryError(
                f"expected a model before it is wrapped, got {wrapper} at {sources.where(name)}, which holds on to "
                "what is inside: convert the model, then wrap it"
            )
    inner, prefix = unwrapped(model)
    if "_orig_mod" in prefix and (is_batch_norm(inner) or is_frozen(inner) or origin.was_converted(inner)):
        raise SurgeryError(
            f"expected a layer before it is compiled, got the result of torch.compile of a {type(inner).__name__}: "
            "compile it afterwards"
        )


def _users(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    """Which modules have a parameter."""
    found: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(parameter, set()).add(module)
    return found


def _elsewhere(used: Mapping[nn.Parameter, set[nn.Module]], layer: nn.Module) -> set[nn.Parameter]:
    own = set(layer.modules())
    return {parameter for parameter, users in used.items() if not users <= own}


def _exchange(
    model: nn.Module, found: list[Layer], exchanged: dict[nn.Module, nn.Module], optimizers: tuple[Any, ...]
) -> nn.Module:
    before = set(model.parameters())
    root = replace(model, exchanged)
    after = set(root.parameters())
    mend(
        optimizers,
        [
            Exchange(
                layer.name,
                gone=tuple(p for p in layer.module.parameters() if p not in after),
                come=tuple(p for p in exchanged[layer.module].parameters() if p not in before),
            )
            for layer in found
            if layer.module in exchanged
        ],
    )
    return root


def _change(found: Layer, old: nn.Module, made: nn.Module, lost: list[str], note: str = "") -> Change:
    also = f" (also at {', '.join(repr(name) for name in found.names[1:])})" if len(found.names) > 1 else ""
    return Change(found.name, f"{_label(old)} became {_label(made)}{note}{also}", ", ".join(lost))


def _label(module: Any) -> str:
    if not isinstance(module, nn.Module):
        return type(module).__name__
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = parametrize.type_before_parametrizations(module)
    home = kind.__module__
    place = "torch.nn." if home.startswith("torch.nn.") else "bn.nn." if home.startswith("batchnorm.nn.") else ""
    size = f"({module.num_features})" if hasattr(module, "num_features") else ""
    if isinstance(module, nn.GroupNorm):
        size = f"({module.num_groups}, {module.num_channels})"
    return f"{place}{kind.__name__}{size}"
