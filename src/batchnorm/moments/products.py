"""Sums of products between channels: the cost of a scatter matrix, where only matrix multiplication counts."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.moments.blocks import cut_blocks

# Larger blocks than elsewhere: each is several parallel regions, and one of these costs milliseconds whenever another
# process wants the same cores.
_BLOCK_ELEMENTS = 2**20
# Below this width two products of half the width are no faster than one.
_PRODUCT_COLUMNS = 128


def products_about(x: Tensor, weights: Tensor | None, channel_axis: int, mean: Tensor) -> Tensor:
    """``sum_i w_i (x_i - mean)(x_i - mean)^T`` (C, C), float64, for the channel vectors of finite ``x`` (N, C, *)."""
    channels = x.shape[channel_axis]
    total = torch.zeros(channels, channels, dtype=torch.float64, device=x.device)
    # One buffer for all blocks: fresh memory would cost more than the arithmetic on it.
    buffer = total.new_empty(0)
    for block, block_weights in cut_blocks(x, weights, channel_axis, limit=_BLOCK_ELEMENTS):
        rows = block.movedim(channel_axis, -1)
        if buffer.numel() < rows.numel():
            buffer = total.new_empty(rows.numel())
        deviation = buffer[: rows.numel()].view(rows.shape).copy_(rows).sub_(mean).view(-1, channels)
        weighted = deviation
        if block_weights is not None:
            w = block_weights.movedim(channel_axis, -1).expand(*rows.shape[:-1], 1).reshape(-1, 1)
            # Without weight a value does not count, whatever it is.
            deviation = deviation.masked_fill_(w == 0, 0)
            weighted = deviation * w
        _add_products(total, weighted, deviation)
    lower = total.tril()
    return lower + lower.tril(-1).T


def _add_products(to: Tensor, weighted: Tensor, deviation: Tensor) -> None:
    """Add ``weighted^T deviation`` to the lower triangle of ``to`` at least; most of the upper is not computed."""
    columns = to.shape[0]
    if columns <= _PRODUCT_COLUMNS:
        to.addmm_(weighted.T, deviation)
        return
    half = columns // 2
    to[half:, :half].addmm_(weighted[:, half:].T, deviation[:, :half])
    _add_products(to[:half, :half], weighted[:, :half], deviation[:, :half])
    _add_products(to[half:, half:], weighted[:, half:], deviation[:, half:])
