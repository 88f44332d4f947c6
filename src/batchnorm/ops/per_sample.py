"""Normalization with coefficients of their own for each sample: conditional gamma and beta, weighted inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.reference import selected


def normalize(
    operators: Any,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    """``operators.normalize`` for mean, invstd, weight and bias of shape (C,) or (N, C).

    The channels of every sample are taken for channels of one large sample, (1, N * C, *spatial), so that the same
    kernel does it in one pass and its gradients are those of each sample.
    """
    shape = x.shape
    folded = (1, shape[0] * shape[1], *shape[2:])

    def row(coefficient: Tensor | None) -> Tensor | None:
        return None if coefficient is None else coefficient.expand(shape[:2]).reshape(folded[1])

    kept = x
    if mask is not None:
        # A mask is each sample's own, and all those channels would have to share one: zeros stand for it.
        x = selected(x, mask)
        residual = None if residual is None else selected(residual, mask)
    y = operators.normalize(
        x.reshape(folded),
        row(mean),
        row(invstd),
        row(weight),
        row(bias),
        None if residual is None else residual.reshape(folded),
        None,
        activation,
    )[0].reshape(shape)
    return laid_out(kept, y if mask is None else selected(y, mask))


def mixed_statistics(
    operators: Any, x: Tensor, mask: Tensor | None, mean: Tensor, var: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Mean and variance, (N, C), of a mixture: ``alpha`` of the sample itself, 1 - alpha of the population.

    var = alpha var_n + (1 - alpha) var + alpha (1 - alpha) (mean_n - mean)^2, the variance of that mixture: what
    Summers & Dinneen (2020), section 3.1, write with second moments, without their cancellation.
    """
    count, own_mean, m2 = _own_statistics(operators, x, mask)
    weight = alpha * (count > 0).to(own_mean.dtype)  # a sample without a real position says nothing
    own_var = m2 / count.clamp(min=1)
    apart = own_mean - mean
    return mean + weight * apart, (1 - weight) * var + weight * own_var + weight * (1 - weight) * apart * apart


def _own_statistics(operators: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """count, (N, 1) or (), mean and m2, (N, C), of each sample."""
    if mask is None:
        folded = x.reshape(1, x.size(0) * x.size(1), *x.shape[2:])
        count, mean, m2 = operators.stats(folded, None)
        return count, mean.reshape(x.shape[:2]), m2.reshape(x.shape[:2])
    # The masks differ from sample to sample, so each of them is a batch of its own.
    count, mean, m2 = torch.vmap(reference.stats)(x.unsqueeze(1), mask.unsqueeze(1))
    return count.unsqueeze(1), mean, m2


def laid_out(x: Tensor, y: Tensor) -> Tensor:
    """y in x's memory format; as it is where torch looks inside, which has none."""
    if reference.composing():
        return y
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=memory_format) and not x.is_contiguous():
            return y.contiguous(memory_format=memory_format)
    return y.contiguous()
