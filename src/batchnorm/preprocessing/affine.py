"""The operator ``batchnorm::affine``: the map of the scalers, in one pass.

    y = ((x - mean) - mean_low) / scale + offset, held in [low, high]
    y = ((x - offset) * scale + mean_low) + mean, with ``inverse``

and ``batchnorm::result_like``, an uninitialized tensor for its result, of x's shape, dtype and strides.

It is computed in float64 and rounded once. ``x`` is (N, C) or (N, C, P), floating point, with any strides; ``mean``,
``mean_low`` and ``scale`` are (C,) in float64. y is written into ``out``, of x's shape and dtype, which may be x. The
operator returns whether x holds an infinite value; NaN stays NaN. The C++ kernel is in csrc/features.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm._library import NAMESPACE, load

SCHEMA = (
    "affine(Tensor x, Tensor mean, Tensor mean_low, Tensor scale, float offset, float low, float high, bool inverse,"
    " Tensor(a!) out) -> bool"
)
RESULT_SCHEMA = "result_like(Tensor x) -> Tensor"
# The float64 copy of one block of rows stays in a core's second-level cache.
_BLOCK_ELEMENTS = 2**17


def reference(
    x: Tensor,
    mean: Tensor,
    mean_low: Tensor,
    scale: Tensor,
    offset: float,
    low: float,
    high: float,
    inverse: bool,
    out: Tensor,
) -> bool:
    """The operator in plain torch, block by block, for every device."""
    mean, mean_low, scale = (s.to(torch.float64).view(1, -1, *[1] * (x.ndim - 2)) for s in (mean, mean_low, scale))
    infinite = False
    step = max(1, _BLOCK_ELEMENTS * x.shape[0] // max(1, x.numel()))
    for block, written in zip(x.split(step), out.split(step), strict=True):
        # One sum says whether to look closer.
        infinite |= not bool(torch.isfinite(block.sum())) and bool(torch.isinf(block).any())
        y = torch.empty_like(block, dtype=torch.float64).copy_(block)
        if inverse:
            y.sub_(offset).mul_(scale).add_(mean_low).add_(mean)
        else:
            y.sub_(mean).sub_(mean_low).div_(scale).add_(offset)
            if low > -torch.inf or high < torch.inf:
                y.clamp_(low, high)
        written.copy_(y)
    return infinite


def reference_result(x: Tensor) -> Tensor:
    """torch's own memory; the C++ kernel takes that of results which have been freed, whose pages are there already."""
    return torch.empty_like(x)


# Kept for the life of the process: a Library that is collected takes its registrations with it.
_registrations = torch.library.Library(NAMESPACE, "FRAGMENT")
_registrations.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_registrations.impl("affine", reference, "CompositeExplicitAutograd")
_registrations.define(RESULT_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_registrations.impl("result_like", reference_result, "CompositeExplicitAutograd")
load()
