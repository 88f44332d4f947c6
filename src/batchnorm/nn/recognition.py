"""Which modules of a model normalize by the statistics of batches, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from batchnorm.nn.frozen import FrozenBatchNorm


@dataclass(frozen=True)
class Layer:
    """A normalization layer and where it is.

    Attributes:
        names: the paths under which the model holds it, more than one where it is shared; ``""`` is the model itself.
        module: the layer.
    """

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        """The first path."""
        return self.names[0]


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalizes with statistics of its batch in training: torch's, ours and subclasses of them.

    Instance norm is none, though it may have running statistics; a frozen layer is none, see :func:`is_frozen`.
    """
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm that is constant by its class: ours, and torchvision's or detectron2's."""
    if isinstance(module, FrozenBatchNorm):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False  # of what it was, nothing is left to see
    buffers = module._buffers
    return (
        not isinstance(module, nn.modules.batchnorm._NormBase)
        and not is_batch_norm(module)
        and all(isinstance(buffers.get(key), torch.Tensor) for key in ("running_mean", "running_var", "weight", "bias"))
    )


FROZEN = "batchnorm_frozen"
"""The attribute in which :func:`batchnorm.freeze` keeps, in the layer itself, what it froze and what was there before.

A plain dictionary: ``"affine"`` is what required a gradient, by name; ``"update"`` was the layer's
``track_running_stats``; ``"use"`` its mode. What is not frozen is not in it.
"""


RECALIBRATED = "batchnorm_recalibrated"
"""The attribute in which :func:`batchnorm.recalibrate` notes, in a ``swa_utils.AveragedModel``, its ``n_averaged``.

As long as that number is the same, running statistics are those of the averaged weights: nothing else tells.
"""


def frozen_parts(module: nn.Module) -> frozenset[str]:
    """What :func:`batchnorm.freeze` has frozen of ``module``: of "affine", "update" and "use"; empty where nothing."""
    return frozenset(module.__dict__.get(FROZEN, ()))


def batch_norms(model: nn.Module, frozen: bool = False) -> Iterator[Layer]:
    """The batch norms of ``model``, each once, in the order of ``named_modules``.

    Args:
        model: any module.
        frozen: with True, those that are constant by their class too.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_batch_norm(module) or (frozen and is_frozen(module)):
            names.setdefault(module, []).append(name)
    for module, found in names.items():
        yield Layer(tuple(found), module)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside ``torch.compile`` and the parallel wrappers, and the prefix of its names (``"module."``)."""
    prefix = ""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner, step = model.module, "module."
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            inner, step = model._orig_mod, "_orig_mod."
        else:
            return model, prefix
        assert isinstance(inner, nn.Module)
        model, prefix = inner, prefix + step
