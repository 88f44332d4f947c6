"""Batch-normalization layers, drop-in for ``torch.nn``'s."""

from __future__ import annotations

from batchnorm.nn import functional, state
from batchnorm.nn.alignment import CORALLoss, coral_loss
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.complex_batch_norm import ComplexBatchNorm1d, ComplexBatchNorm2d, ComplexBatchNorm3d
from batchnorm.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from batchnorm.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchnorm.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.nn.outside import NormOutsideGradient
from batchnorm.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, LinearRamp
from batchnorm.nn.sync import SyncBatchNorm
from batchnorm.nn.whitened_linear import WhitenedLinear
from batchnorm.nn.whitening import DecorrelatedBatchNorm, IterNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "CORALLoss",
    "ComplexBatchNorm1d",
    "ComplexBatchNorm2d",
    "ComplexBatchNorm3d",
    "DecorrelatedBatchNorm",
    "FrozenBatchNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "IterNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LinearRamp",
    "NormOutsideGradient",
    "SyncBatchNorm",
    "WhitenedLinear",
    "coral_loss",
    "functional",
    "state",
]
