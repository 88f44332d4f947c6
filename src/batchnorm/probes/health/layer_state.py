"""What the rules read of a batch norm, whoever's it is: its tensors where they hold data, and how it is frozen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.nn.recognition import frozen_parts, is_frozen
from batchnorm.nn.whitening import _WhiteningLayer

MOST_LISTED = 8


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of ``module``; None where there is none, or none that can be read.

    A lazy layer's and those on the meta device hold nothing, one that is spread over processes is in no single place,
    and to read a parametrized one may change the state of its parametrization.
    """
    tensor: Tensor | None = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers.get(name)
    if tensor is None or is_lazy(tensor) or tensor.device.type == "meta" or hasattr(tensor, "to_local"):
        return None
    return tensor.detach()


def values(module: nn.Module, name: str) -> Tensor | None:
    """:func:`held` in float64 on the CPU."""
    tensor = held(module, name)
    return None if tensor is None or tensor.is_complex() else tensor.cpu().double()


def statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """running_mean and running_var, (C,) each, in float64.

    None where there are none, or there is another kind of second moment (a covariance).
    """
    mean, var = values(module, "running_mean"), values(module, "running_var")
    if mean is None or var is None or mean.dim() != 1 or mean.shape != var.shape or not mean.numel():
        return None
    return mean, var


def has_statistics(module: nn.Module) -> bool:
    """Whether there are running statistics that eval normalizes with."""
    return module._buffers.get("running_mean") is not None


def counted(module: nn.Module) -> float:
    """num_batches_tracked; 0 where it is not kept."""
    number = held(module, "num_batches_tracked")
    return 0.0 if number is None or number.numel() != 1 else float(number)


def initial(module: nn.Module) -> bool:
    """Whether the running statistics are there, and those of a new layer."""
    mean = values(module, "running_mean")
    if mean is None or not mean.numel() or counted(module):
        return False
    cov = held(module, "running_cov" if isinstance(module, _WhiteningLayer) else "running_covar")
    if cov is not None:  # what it is at first depends on the layer; the mean will do
        return not bool(mean.any())
    var = values(module, "running_var")
    return var is not None and not bool(mean.any()) and bool((var == 1).all())


def uses_batch(module: nn.Module) -> bool:
    """Whether a forward normalizes with its batch where eval would with running statistics."""
    return module.training and has_statistics(module) and not is_frozen(module) and "use" not in frozen_parts(module)


def moves(module: nn.Module) -> bool:
    """Whether a forward, as the layer is now, moves its running statistics."""
    return (
        module.training
        and has_statistics(module)
        and not is_frozen(module)
        and "update" not in frozen_parts(module)
        and bool(getattr(module, "track_running_stats", True))
        and getattr(module, "momentum", None) != 0
    )


def to_move(module: nn.Module, name: str) -> str:
    """What makes running statistics that are held ones that can be recalibrated; empty where they can be."""
    if is_frozen(module):
        return f'bn.convert(model, to="torch", layers={name!r}), as it is constant by its class'
    if "update" in frozen_parts(module):
        return f"bn.unfreeze(model, {name!r}), as it is frozen"
    if has_statistics(module) and not getattr(module, "track_running_stats", True):
        return "set its track_running_stats to True"
    return ""


def of_channels(found: Tensor) -> str:
    """``3 of 64 channels (0, 5, 17)``, for a mask (C,)."""
    return f"{int(found.sum())} of {found.numel()} channels ({listed(torch.nonzero(found).flatten().tolist())})"


def listed(items: Iterable[object], most: int = MOST_LISTED) -> str:
    """``a, b, c and 5 more``."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
