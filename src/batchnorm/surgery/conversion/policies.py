"""From a class to the layer of it that takes another's place, and what that cannot keep."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm._checks import check_choice
from batchnorm._errors import BatchnormError, InputError, SurgeryError
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNormLayer
from batchnorm.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from batchnorm.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d, _GhostBatchNormLayer
from batchnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, _BatchRenormLayer
from batchnorm.nn.sync import SyncBatchNorm
from batchnorm.nn.twins import twin
from batchnorm.ops.activations import activation_layer
from batchnorm.surgery.conversion.activated import activated
from batchnorm.surgery.conversion.sources import Source, where

Maker: TypeAlias = Callable[[str, nn.Module], nn.Module | None]

_CLASSES: dict[str, dict[int | None, type[nn.Module]]] = {
    "ours": {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d},
    "torch": {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "sync": dict.fromkeys((1, 2, 3, None), SyncBatchNorm),
    "ghost": {1: GhostBatchNorm1d, 2: GhostBatchNorm2d, 3: GhostBatchNorm3d},
    "renorm": {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d},
    "frozen": {1: FrozenBatchNorm1d, 2: FrozenBatchNorm2d, 3: FrozenBatchNorm3d, None: FrozenBatchNorm},
    "group": dict.fromkeys((1, 2, 3, None), nn.GroupNorm),
    "layer": dict.fromkeys((1, 2, 3, None), nn.GroupNorm),
    "instance": {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
}
TARGETS = tuple(_CLASSES)
"""What a layer can be converted to by name."""

# They are what the tensors say, or where these are.
# Channels of a group at least, of what may be given (N, C).
_LEAST_FLAT = 4
_NOT_OPTIONS = {"num_features", "num_channels", "affine", "bias", "track_running_stats", "device", "dtype", "decay"}


def target(to: str | type[nn.Module], source: Source) -> type[nn.Module]:
    """The class that ``source`` becomes.

    Raises:
        SurgeryError: it depends on the rank of the input, of which the layer does not tell.
    """
    if isinstance(to, type):
        return to
    kind = to
    if to == "ours" and source.frozen:
        kind = "frozen"
    if to == "ours" and source.sync:
        kind = "sync"
    if to == "torch" and source.sync:
        return nn.SyncBatchNorm
    if source.rank not in _CLASSES[kind]:
        names = ", ".join(found.__name__ for found in _CLASSES[kind].values())
        raise SurgeryError(
            f"expected layers that tell the rank of their input, got {source.base.__name__} at {where(source.name)}: "
            f"give the class as to=, one of {names}"
        )
    return _CLASSES[kind][source.rank]


def classes(to: str) -> tuple[type[nn.Module], ...]:
    """The classes that ``to`` can mean."""
    return tuple(_CLASSES[to].values())


def make(to: str | type[nn.Module], source: Source, options: dict[str, Any]) -> tuple[nn.Module, bool]:
    """The layer that takes the place of ``source``, without what belongs to the user, and whether it ends with the
    drop and act of the old one by itself.

    Raises:
        InputError: (ValueError) an option that the class does not take, or not this value of it.
        SurgeryError: the layer cannot become this.
    """
    kind, asked = target(to, source), options
    if to == "layer":
        options = {"num_groups": 1, **options}
    _check_options(kind, options)
    tail = _tail(source)
    absorbed = False
    if issubclass(kind, _BatchNormLayer | FrozenBatchNorm):
        fused = source.activation if source.drop is None and source.act is None else _fused(source)
        absorbed = fused != "unknown"
        options = {"activation": fused if absorbed else None, **options}
    policy = next(policy for family, policy in _POLICIES.items() if issubclass(kind, family))
    try:
        made = policy(kind, source, options)
    except BatchnormError as error:
        if isinstance(error, SurgeryError):
            raise
        raise SurgeryError(f"{where(source.name)} cannot become a {kind.__name__}: {error}") from error
    except TypeError as error:
        raise InputError(f"expected the options of {kind.__name__}, got {_named(asked)}: {error}") from error
    if not absorbed and tail is not None:
        made.__class__ = activated(type(made))
        made.drop, made.act = tail
    made.training = source.layer.training
    return made, absorbed


def lost(source: Source, made: nn.Module) -> list[str]:
    """What ``made`` does not keep of what ``source`` does."""
    found = [f"what {type(source.layer).__name__} defines: {', '.join(source.unkept)}"] if source.unkept else []
    ours = isinstance(made, _BatchNormLayer | FrozenBatchNorm)
    if source.ours and not ours:
        found.append("mask, lengths and residual of forward")
    if source.ours and not source.frozen and isinstance(made, FrozenBatchNorm):
        found.append("weight and bias of forward")
    if source.ours and not isinstance(made, _BatchNormLayer):
        policies = [("ddof", 1), ("on_single_value", "raise")] if not isinstance(made, FrozenBatchNorm) else []
        for name, default in [*policies, ("inference_weight", 0.0)]:
            if source.setting(name, default) != default:
                found.append(f"{name}={source.setting(name, default)!r}")
    if source.frozen and not isinstance(made, FrozenBatchNorm):
        found.append("being constant")
    if isinstance(source.layer, _GhostBatchNormLayer) and not isinstance(made, _GhostBatchNormLayer):
        found.append(f"ghost batches of {source.layer.virtual_batch_size}")
    if isinstance(source.layer, _BatchRenormLayer) and not isinstance(made, _BatchRenormLayer):
        found.append("renormalization")
    if source.sync and isinstance(made, _BatchNorm) and not isinstance(made, SyncBatchNorm | nn.SyncBatchNorm):
        found.append("the statistics of other processes")
    if source.layer._buffers.get("running_mean") is not None and made._buffers.get("running_mean") is None:
        found.append("running statistics, in training and eval it normalizes each sample")
    if isinstance(made, nn.InstanceNorm1d):
        found.append("(N, C) input")
    if "_compiled_call_impl" in vars(source.layer):
        found.append("what its compile() made")
    return found


def note(to: Any, made: nn.Module) -> str:
    """What is to be said about how a layer was made."""
    if to == "group" and isinstance(made, nn.GroupNorm) and made.num_groups < min(32, made.num_channels):
        size = made.num_channels // made.num_groups
        return f", in {made.num_groups} groups of {size} channels"
    return ""


def _twin(kind: type[nn.Module], source: Source, options: dict[str, Any]) -> nn.Module:
    """Batch norm, torch's and ours: the tensors themselves; gamma and beta of a frozen layer become parameters."""
    assert issubclass(kind, _BatchNorm)
    layer = source.layer
    if source.sync and issubclass(kind, SyncBatchNorm | nn.SyncBatchNorm):
        options = {"process_group": getattr(layer, "process_group", None), **options}
    if isinstance(layer, _BatchNorm):
        return twin(kind, layer, **options)
    made = kind(source.num_features, device="meta", **{"eps": source.eps, **options})
    made.affine = layer._buffers.get("weight") is not None
    for name in ("weight", "bias"):
        held = layer._buffers.get(name)
        made.register_parameter(name, None if held is None else nn.Parameter(held.detach().clone()))
    _take_statistics(made, layer)
    return made


def _frozen(kind: type[nn.Module], source: Source, options: dict[str, Any]) -> nn.Module:
    """gamma and beta as buffers of their own, the running statistics themselves."""
    assert issubclass(kind, FrozenBatchNorm)
    layer = source.layer
    if layer._buffers.get("running_mean") is None:
        raise SurgeryError(f"expected running statistics to freeze, got none at {where(source.name)}")
    held = {name: layer._buffers.get(name, layer._parameters.get(name)) for name in ("weight", "bias")}
    for name, tensor in held.items():
        if tensor is None and getattr(layer, name, None) is not None:
            raise SurgeryError(
                f"expected a weight and bias that are tensors to freeze, got a {name} at {where(source.name)} that is "
                "made of other tensors: remove its parametrization or pruning first"
            )
    made = kind(
        source.num_features, device="meta", **{"eps": source.eps, "affine": held["weight"] is not None, **options}
    )
    for name, tensor in held.items():
        if tensor is None:
            made._buffers.pop(name, None)
            made.register_parameter(name, None)
        else:
            # A copy: an optimizer that still has the parameter must not move it.
            made._buffers[name] = tensor if name in layer._buffers else tensor.detach().clone()
    _take_statistics(made, layer)
    return made


def _take_statistics(made: nn.Module, layer: nn.Module) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        held = layer._buffers.get(name)
        if held is not None:
            made._buffers[name] = held
    mean, counted = made._buffers["running_mean"], made._buffers["num_batches_tracked"]
    assert mean is not None
    if counted is not None and counted.device != mean.device:  # foreign frozen layers have none
        made._buffers["num_batches_tracked"] = torch.zeros_like(counted, device=mean.device)


def _group(kind: type[nn.Module], source: Source, options: dict[str, Any]) -> nn.Module:
    """Group norm: gamma and beta themselves."""
    channels = source.num_features
    groups = options.pop("num_groups", None)
    if groups is None:
        # BatchNorm1d may be given (N, C), where a group of one channel is 0 whatever the input, and one of two a sign.
        groups = default_groups(channels, _LEAST_FLAT if isinstance(source.layer, nn.BatchNorm1d) else 1)
    try:
        made = kind(groups, channels, **{"eps": source.eps, "device": "meta", **options})
    except ValueError as error:
        raise SurgeryError(f"{where(source.name)} cannot become a {kind.__name__}: {error}") from error
    return _with_affine(made, source)


def default_groups(channels: int, least: int) -> int:
    """The most groups up to 32 (Wu & He 2018) that divide ``channels``, with ``least`` of them each; else one group."""
    fitting = (count for count in range(32, 1, -1) if channels % count == 0 and channels // count >= least)
    return next(fitting, 1)


def _instance(kind: type[nn.Module], source: Source, options: dict[str, Any]) -> nn.Module:
    """Instance norm without running statistics: gamma and beta themselves."""
    settings = {"eps": source.eps, "momentum": source.setting("momentum", 0.1), "device": "meta", **options}
    made = kind(source.num_features, affine=True, track_running_stats=False, **settings)
    return _with_affine(made, source)


def _with_affine(made: nn.Module, source: Source) -> nn.Module:
    layer = source.layer
    for name in ("weight", "bias"):
        held = layer._parameters.get(name)
        constant = layer._buffers.get(name)
        if constant is not None:
            held = nn.Parameter(constant.detach().clone())
        made.register_parameter(name, held)
    vars(made)["affine"] = getattr(layer, "weight", None) is not None
    return made


def _foreign(kind: type[nn.Module], source: Source, options: dict[str, Any]) -> nn.Module:
    """A class of a user's own: made with C and the options; takes the tensors whose names and shapes it has."""
    made = kind(source.num_features, **options)
    like = next((t for t in (*source.layer.parameters(), *source.layer.buffers()) if t.is_floating_point()), None)
    if like is not None:
        made.to(like.device, like.dtype)
    pairs: Any = ((source.layer._parameters, made._parameters), (source.layer._buffers, made._buffers))
    for held, taken in pairs:
        for name, tensor in held.items():
            there = taken.get(name)
            if tensor is not None and there is not None and there.shape == tensor.shape:
                taken[name] = tensor
    return made


# The class-to-policy map: the first family that a class belongs to makes it.
_POLICIES: dict[type[nn.Module], Callable[[Any, Source, dict[str, Any]], nn.Module]] = {
    _BatchNorm: _twin,
    FrozenBatchNorm: _frozen,
    nn.GroupNorm: _group,
    _InstanceNorm: _instance,
    nn.Module: _foreign,
}


def _tail(source: Source) -> tuple[nn.Module, nn.Module] | None:
    """drop and act as modules, where there is anything of the kind."""
    if source.activation is not None:
        return nn.Identity(), activation_layer(source.activation)
    if source.drop is None and source.act is None:
        return None
    return source.drop or nn.Identity(), source.act or nn.Identity()


def _fused(source: Source) -> str | None:
    """The activation of an operator of ours that is this drop and act, "unknown" where there is none."""
    drop, act = source.drop, source.act
    if any(module is not None and (_hooked(module) or module._modules) for module in (drop, act)):
        return "unknown"
    if drop is not None and type(drop) is not nn.Identity:
        return "unknown"
    match act:
        case None | nn.Identity():
            return None
        case nn.ReLU() if type(act) is nn.ReLU:
            return "relu"
        case nn.SiLU() if type(act) is nn.SiLU:
            return "silu"
        case nn.GELU(approximate="none") if type(act) is nn.GELU:
            return "gelu"
        case nn.Hardswish() if type(act) is nn.Hardswish:
            return "hardswish"
        case nn.LeakyReLU(negative_slope=0.01) if type(act) is nn.LeakyReLU:
            return "leaky_relu"
    return "unknown"


def _hooked(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def _check_options(kind: type[nn.Module], options: dict[str, Any]) -> None:
    if not options:
        return
    known: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" in vars(cls) and issubclass(cls, nn.Module):
            known |= set(inspect.signature(cls.__init__).parameters)
    if not issubclass(kind, _BatchNorm | FrozenBatchNorm | nn.GroupNorm | _InstanceNorm):
        return
    known -= {"self", "args", "kwargs", *_NOT_OPTIONS}
    for name in options:
        check_choice(f"an option of {kind.__name__}", name, sorted(known))


def _named(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none"
