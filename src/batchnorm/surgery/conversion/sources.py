"""What a layer is that is to be converted: whose ways it has, of what rank, with what activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm._errors import SurgeryError
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNormLayer
from batchnorm.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from batchnorm.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchnorm.nn.recognition import Layer, is_frozen
from batchnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchnorm.nn.sync import SyncBatchNorm
from batchnorm.surgery.conversion.activated import Activated, base_of

# The classes that are known, by the spatial dimensions of their input: of those in the first row any number will do.
_FAMILIES: dict[int | None, tuple[type[nn.Module], ...]] = {
    None: (nn.SyncBatchNorm, SyncBatchNorm, FrozenBatchNorm),
    1: (nn.BatchNorm1d, BatchNorm1d, GhostBatchNorm1d, BatchRenorm1d, FrozenBatchNorm1d),
    2: (nn.BatchNorm2d, BatchNorm2d, GhostBatchNorm2d, BatchRenorm2d, FrozenBatchNorm2d),
    3: (nn.BatchNorm3d, BatchNorm3d, GhostBatchNorm3d, BatchRenorm3d, FrozenBatchNorm3d),
}
_RANKS = {kind: rank for rank, kinds in _FAMILIES.items() for kind in kinds}
_TIMM: dict[str, int | None] = {"BatchNormAct2d": 2, "SyncBatchNormAct": None, "FrozenBatchNormAct2d": 2}
# A subclass that defines nothing but these computes what its base does.
_HARMLESS = {"extra_repr", "__repr__", "__str__", "__annotate__", "__annotate_func__"}


@dataclass(frozen=True)
class Source:
    """A layer that is to be converted.

    Attributes:
        layer: the module.
        name: where the model has it, the first path.
        base: the class whose ways it has: torch's, timm's or ours.
        rank: spatial dimensions of its input, None where they are not known.
        activation: what the operator ends with, of a layer of ours.
        drop, act: what follows the operator, of a layer of timm's and of :class:`Activated`.
        unkept: what a subclass defines, that is taken for its base.
    """

    layer: nn.Module
    name: str
    base: type[nn.Module]
    rank: int | None
    activation: str | None
    drop: nn.Module | None
    act: nn.Module | None
    unkept: tuple[str, ...]

    @property
    def frozen(self) -> bool:
        """Whether it is constant by its class."""
        return is_frozen(self.layer)

    @property
    def sync(self) -> bool:
        """Whether it shares statistics with other processes."""
        return issubclass(self.base, nn.SyncBatchNorm | SyncBatchNorm)

    @property
    def ours(self) -> bool:
        """Whether its forward takes what those of this package take: masks, lengths, a residual."""
        return issubclass(self.base, _BatchNormLayer | FrozenBatchNorm)

    @property
    def num_features(self) -> int:
        """C."""
        found = getattr(self.layer, "num_features", None)
        if found is None:
            found = self.layer._buffers["running_mean"].numel()  # type: ignore[union-attr]
        return int(found)

    @property
    def eps(self) -> float:
        """What is added to the variance. Frozen layers that do not say have 1e-5, which is tried when they are read."""
        return float(getattr(self.layer, "eps", 1e-5))

    def setting(self, name: str, default: Any) -> Any:
        """An attribute of the layer, or ``default``."""
        return getattr(self.layer, name, default)


def where(name: str) -> str:
    """A path, for a message."""
    return repr(name) if name else "the root"


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class of ``layer``, without those that torch's parametrizations and :class:`Activated` put in front."""
    kind: type[nn.Module] = type(layer)
    if parametrize.is_parametrized(layer):
        kind = parametrize.type_before_parametrizations(layer)
    return base_of(kind)


def read(found: Layer, unknown: str, anything: bool = False) -> Source | None:
    """What ``found`` is; None where it is unknown and ``unknown`` is "skip".

    Args:
        found: the layer.
        unknown: "refuse", "skip" or "base".
        anything: a user's function takes it, whatever it is.

    Raises:
        SurgeryError: it has not seen its first input yet, or it is unknown and is not to be skipped.
    """
    layer, name = found.module, found.name
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and not anything:
        raise SurgeryError(
            f"expected layers that know their number of channels, got {type(layer).__name__} at {where(name)}, which "
            "has not seen an input yet: run the model once"
        )
    base, unkept = _base(plain_class(layer))
    overridden = [name for name, value in vars(layer).items() if callable(value) and hasattr(type(layer), name)]
    unkept += tuple(name for name in overridden if name not in (*unkept, "_compiled_call_impl"))
    if base is None and anything:
        base, unkept = plain_class(layer), ()
    elif base is None and is_frozen(layer):
        base, unkept = plain_class(layer), ()
        if not _computes_as_frozen(layer):
            base, unkept = None, ("forward",)
    if base is None or (unkept and unknown == "refuse"):
        if unknown == "skip":
            return None
        raise SurgeryError(_unknown(layer, name, base, unkept))
    if unkept and unknown == "skip":
        return None
    has_tail = isinstance(layer, Activated) or _is_timm(base)
    return Source(
        layer,
        name,
        base,
        _rank(base),
        getattr(layer, "activation", None) if issubclass(base, _BatchNormLayer | FrozenBatchNorm) else None,
        getattr(layer, "drop", None) if has_tail else None,
        getattr(layer, "act", None) if has_tail else None,
        unkept,
    )


def _base(kind: type[nn.Module]) -> tuple[type[nn.Module] | None, tuple[str, ...]]:
    """The known class that ``kind`` stems from, and what was defined on the way."""
    defined: list[str] = []
    for cls in kind.__mro__:
        if cls in _RANKS or _is_timm(cls):
            return cls, tuple(defined)
        functions = (
            callable(value) or isinstance(value, property | staticmethod | classmethod) for value in vars(cls).values()
        )
        defined += [
            name
            for name, is_function in zip(vars(cls), functions, strict=True)
            if is_function and name not in _HARMLESS and name not in defined
        ]
    return None, tuple(defined)


def _is_timm(kind: type) -> bool:
    return kind.__name__ in _TIMM and kind.__module__.split(".")[0] == "timm"


def _rank(base: type[nn.Module]) -> int | None:
    if base in _RANKS:
        return _RANKS[base]
    if _is_timm(base):
        return _TIMM[base.__name__]
    return next((rank for rank in (1, 2, 3) if base.__name__.endswith(f"{rank}d")), None)


def _unknown(layer: nn.Module, name: str, base: type[nn.Module] | None, unkept: tuple[str, ...]) -> str:
    kind = plain_class(layer).__name__
    if base is None:
        return (
            f"expected layers of torch, timm or batchnorm to convert, got {kind} at {where(name)}, of which nothing is "
            'known: choose other layers, or unknown="skip"'
        )
    return (
        f"expected layers of torch, timm or batchnorm to convert, got {kind} at {where(name)}, which defines "
        f'{", ".join(unkept)}: unknown="skip" leaves it, unknown="base" takes it for a {base.__name__}'
    )


@torch.no_grad()
def _computes_as_frozen(layer: nn.Module) -> bool:
    """Whether a frozen layer of a foreign class does what the tensors and the eps that it shows say.

    Some have their eps in the code only.
    """
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    assert mean is not None
    assert var is not None
    if mean.is_meta or _is_timm(type(layer)):
        return True
    rank = _rank(type(layer))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, mean.numel(), *[3] * (2 if rank is None else rank), generator=generator)
    x = x.to(mean.device, mean.dtype)
    try:
        got = type(layer).forward(layer, x)
    except (RuntimeError, TypeError, ValueError):
        return False
    expected = nn.functional.batch_norm(
        x, mean, var, layer._buffers["weight"], layer._buffers["bias"], eps=float(getattr(layer, "eps", 1e-5))
    )
    tolerance = 1e-2 if mean.dtype.itemsize < 4 else 1e-4
    return isinstance(got, Tensor) and torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
