"""A way, or several, to make each layer, for the battery in test_layers.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import batchnorm as bn


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to make a layer, and the shape of an input for it."""

    layer: type
    make: Callable[..., torch.nn.Module]
    shape: tuple[int, ...]
    formats: tuple[torch.memory_format, ...] = (torch.contiguous_format,)


def materialised(layer: torch.nn.Module, *shape: int) -> torch.nn.Module:
    """A lazy layer after its first forward, which leaves no trace in eval."""
    layer.eval()(torch.zeros(shape, device=layer.running_mean.device))
    return layer.train()


class Split(torch.nn.Module):
    """A layer for complex numbers as one for real ones: (N, C, *) holds the real parts, and makes the others."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self.layer(torch.complex(wide, 0.7 * wide + (wide > 0)), **kwargs)
        return (y.real - 2 * y.imag).to(x.dtype)


CASES = {
    "BatchNorm1d": Case(bn.nn.BatchNorm1d, lambda **kw: bn.nn.BatchNorm1d(3, **kw), (6, 3)),
    "BatchNorm1d-L": Case(bn.nn.BatchNorm1d, lambda **kw: bn.nn.BatchNorm1d(3, activation="relu", **kw), (4, 3, 5)),
    "BatchNorm2d": Case(
        bn.nn.BatchNorm2d,
        lambda **kw: bn.nn.BatchNorm2d(3, activation="silu", **kw),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "BatchNorm2d-cumulative": Case(
        bn.nn.BatchNorm2d, lambda **kw: bn.nn.BatchNorm2d(3, momentum=None, **kw), (4, 3, 2, 5)
    ),
    "BatchNorm3d": Case(
        bn.nn.BatchNorm3d,
        lambda **kw: bn.nn.BatchNorm3d(3, **kw),
        (3, 3, 2, 3, 2),
        (torch.contiguous_format, torch.channels_last_3d),
    ),
    "BatchNorm2d-policies": Case(
        bn.nn.BatchNorm2d,
        lambda **kw: bn.nn.BatchNorm2d(3, decay=0.8, ddof=0, on_single_value="running", inference_weight=0.2, **kw),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "ComplexBatchNorm1d": Case(
        bn.nn.ComplexBatchNorm1d, lambda **kw: Split(bn.nn.ComplexBatchNorm1d(3, activation="silu", **kw)), (6, 3)
    ),
    "ComplexBatchNorm2d": Case(
        bn.nn.ComplexBatchNorm2d, lambda **kw: Split(bn.nn.ComplexBatchNorm2d(3, momentum=None, **kw)), (4, 3, 2, 5)
    ),
    "ComplexBatchNorm3d": Case(
        bn.nn.ComplexBatchNorm3d,
        lambda **kw: Split(bn.nn.ComplexBatchNorm3d(3, ddof=0, on_single_value="running", **kw)),
        (3, 3, 2, 3, 2),
    ),
    "BatchNorm1d-skip": Case(
        bn.nn.BatchNorm1d, lambda **kw: bn.nn.BatchNorm1d(3, on_single_value="skip", activation="gelu", **kw), (4, 3, 5)
    ),
    "LazyBatchNorm1d": Case(
        bn.nn.LazyBatchNorm1d, lambda **kw: materialised(bn.nn.LazyBatchNorm1d(**kw), 1, 3), (6, 3)
    ),
    "LazyBatchNorm2d": Case(
        bn.nn.LazyBatchNorm2d,
        lambda **kw: materialised(bn.nn.LazyBatchNorm2d(ddof=0, **kw), 1, 3, 1, 1),
        (4, 3, 2, 5),
    ),
    "LazyBatchNorm3d": Case(
        bn.nn.LazyBatchNorm3d,
        lambda **kw: materialised(bn.nn.LazyBatchNorm3d(activation="relu", **kw), 1, 3, 1, 1, 1),
        (3, 3, 2, 3, 2),
    ),
    "DecorrelatedBatchNorm": Case(
        bn.nn.DecorrelatedBatchNorm, lambda **kw: bn.nn.DecorrelatedBatchNorm(4, 2, **kw), (6, 4)
    ),
    "DecorrelatedBatchNorm-wider-than-the-batch": Case(
        bn.nn.DecorrelatedBatchNorm, lambda **kw: bn.nn.DecorrelatedBatchNorm(5, 5, momentum=None, **kw), (4, 5)
    ),
    "DecorrelatedBatchNorm-2d": Case(
        bn.nn.DecorrelatedBatchNorm,
        lambda **kw: bn.nn.DecorrelatedBatchNorm(6, 3, activation="silu", **kw),
        (4, 6, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "IterNorm": Case(bn.nn.IterNorm, lambda **kw: bn.nn.IterNorm(4, 2, bias=False, **kw), (6, 4, 3)),
    "IterNorm-3d": Case(
        bn.nn.IterNorm,
        lambda **kw: bn.nn.IterNorm(6, 3, num_iterations=7, activation="relu", **kw),
        (3, 6, 2, 3, 2),
        (torch.contiguous_format, torch.channels_last_3d),
    ),
    "NormOutsideGradient-mean": Case(
        bn.nn.NormOutsideGradient, lambda **kw: bn.nn.NormOutsideGradient(3, "mean", every=2, **kw), (4, 3, 5)
    ),
    "NormOutsideGradient": Case(
        bn.nn.NormOutsideGradient,
        lambda **kw: bn.nn.NormOutsideGradient(3, activation="silu", **kw),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "NormOutsideGradient-whitening": Case(
        bn.nn.NormOutsideGradient, lambda **kw: bn.nn.NormOutsideGradient(4, "whitening", group_size=2, **kw), (6, 4)
    ),
    "WhitenedLinear": Case(bn.nn.WhitenedLinear, lambda **kw: bn.nn.WhitenedLinear(3, 3, **kw), (6, 3)),
    # In one process; tests/distributed has the rest.
    "SyncBatchNorm": Case(
        bn.nn.SyncBatchNorm,
        lambda **kw: bn.nn.SyncBatchNorm(3, activation="relu", **kw),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "BatchRenorm1d": Case(bn.nn.BatchRenorm1d, lambda **kw: bn.nn.BatchRenorm1d(3, **kw), (6, 3)),
    "BatchRenorm1d-clipped": Case(
        bn.nn.BatchRenorm1d,
        lambda **kw: bn.nn.BatchRenorm1d(3, r_max=1.1, d_max=0.1, activation="relu", **kw),
        (4, 3, 5),
    ),
    "BatchRenorm2d-schedules": Case(
        bn.nn.BatchRenorm2d,
        lambda **kw: bn.nn.BatchRenorm2d(
            3, r_max=bn.nn.LinearRamp(1, 3, 0, 4), d_max=bn.nn.LinearRamp(0, 5, 0, 4), warmup_steps=1, **kw
        ),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "BatchRenorm3d": Case(
        bn.nn.BatchRenorm3d,
        lambda **kw: bn.nn.BatchRenorm3d(3, affine=False, **kw),
        (3, 3, 2, 3, 2),
        (torch.contiguous_format, torch.channels_last_3d),
    ),
    "GhostBatchNorm1d": Case(
        bn.nn.GhostBatchNorm1d, lambda **kw: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=2, **kw), (6, 3)
    ),
    "GhostBatchNorm1d-ragged": Case(
        bn.nn.GhostBatchNorm1d,
        lambda **kw: bn.nn.GhostBatchNorm1d(3, virtual_batch_size=3, momentum=None, activation="silu", **kw),
        (8, 3, 5),
    ),
    "GhostBatchNorm2d": Case(
        bn.nn.GhostBatchNorm2d,
        lambda **kw: bn.nn.GhostBatchNorm2d(3, virtual_batch_size=2, activation="relu", **kw),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "GhostBatchNorm3d": Case(
        bn.nn.GhostBatchNorm3d,
        lambda **kw: bn.nn.GhostBatchNorm3d(3, virtual_batch_size=1, **kw),
        (3, 3, 2, 3, 2),
        (torch.contiguous_format, torch.channels_last_3d),
    ),
    "FrozenBatchNorm": Case(bn.nn.FrozenBatchNorm, lambda **kw: bn.nn.FrozenBatchNorm(3, **kw), (2, 3, 2, 1, 2, 3)),
    "FrozenBatchNorm1d": Case(
        bn.nn.FrozenBatchNorm1d, lambda **kw: bn.nn.FrozenBatchNorm1d(3, bias=False, **kw), (4, 3, 5)
    ),
    "FrozenBatchNorm2d": Case(
        bn.nn.FrozenBatchNorm2d,
        lambda **kw: bn.nn.FrozenBatchNorm2d(3, activation="relu", **kw),
        (4, 3, 2, 5),
        (torch.contiguous_format, torch.channels_last),
    ),
    "FrozenBatchNorm3d": Case(
        bn.nn.FrozenBatchNorm3d,
        lambda **kw: bn.nn.FrozenBatchNorm3d(3, affine=False, **kw),
        (3, 3, 2, 3, 2),
        (torch.contiguous_format, torch.channels_last_3d),
    ),
}
