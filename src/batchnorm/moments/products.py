"""The operator ``batchnorm::add_products``: all products between the channels of a batch, added up in place.

``x`` is (N, C) or (N, C, P), floating point, with any strides; ``weights`` (N,) float64, only for (N, C). With
``skip_nan`` a sample that holds a NaN does not count, as one without weight never does, whatever it holds. What is
known of samples is, in float64, contiguous, with deviations ``d_i = x_i - origin``

    count     ()      sum_i w_i
    origin    (C,)    any point near the mean: the operator chooses the first, and moves it when the data move
    total     (C,)    sum_i w_i d_i
    products  (C, C)  sum_i w_i d_i d_i^T, on the diagonal and below; what is above is not specified

from which ``mean = origin + total / count`` and the scatter matrix ``products - total total^T / count`` follow. (T. F.
Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance: analysis and recommendations", 1983:
the shifted algorithm. Its error grows with ``1 + k^2`` where the origin is k deviations from the mean; here k stays
below 4 or so.)

The C++ kernel (csrc/scatter.cpp) reads the memory once. :func:`reference` is two passes in plain torch, for every
device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm._library import NAMESPACE, load
from batchnorm.moments.blocks import cut_blocks

SCHEMA = (
    "add_products(Tensor x, Tensor? weights, bool skip_nan,"
    " Tensor(a!) count, Tensor(b!) origin, Tensor(c!) total, Tensor(d!) products) -> ()"
)

# Larger blocks than elsewhere: each is several parallel regions, and one of these costs milliseconds whenever another
# process wants the same cores.
BLOCK_ELEMENTS = 2**20
# Below this width two products of half the width are no faster than one.
_PRODUCT_COLUMNS = 128


def reference(
    x: Tensor,
    weights: Tensor | None,
    skip_nan: bool,
    count: Tensor,
    origin: Tensor,
    total: Tensor,
    products: Tensor,
) -> None:
    """The mean first, to which the origin is moved, then the products of deviations from it."""
    channels = x.shape[1]
    w = None if weights is None else weights.reshape(-1, *[1] * (x.ndim - 1))

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        """Samples as rows, 0 where they don't count, and their weights as a column."""
        for block, block_weights in cut_blocks(x, w, 1, limit=BLOCK_ELEMENTS):
            rows = block.movedim(1, -1).to(torch.float64)
            shape = (*rows.shape[:-1], 1)
            weight = rows.new_ones(shape) if block_weights is None else block_weights.movedim(1, -1).expand(shape)
            if skip_nan:
                weight = weight * ~torch.isnan(rows).any(dim=-1, keepdim=True)
            yield torch.where(weight > 0, rows, 0).reshape(-1, channels), weight.reshape(-1, 1)

    more, sums = torch.zeros_like(count), torch.zeros_like(total)
    for rows, weight in blocks():
        more += weight.sum()
        sums += (rows * weight).sum(0)
    both = count + more
    shift = torch.where(both > 0, (sums - more * origin + total) / both, 0)
    move_origin(count, origin, total, products, torch.where(torch.isfinite(shift), origin + shift, origin))
    for rows, weight in blocks():
        deviation = (rows - origin).masked_fill_(weight == 0, 0)
        weighted = deviation * weight
        total += weighted.sum(0)
        _add_products(products, weighted, deviation)
    count += more


def move_origin(count: Tensor, origin: Tensor, total: Tensor, products: Tensor, to: Tensor) -> None:
    """Take the deviations from another origin: with ``d' = d - c``, ``sum d'd'^T = sum dd^T - cs^T - sc^T + ncc^T``."""
    shift = to - origin
    moved = total - count * shift
    products.addr_(shift, total, alpha=-1).addr_(moved, shift, alpha=-1)
    total.copy_(moved)
    origin.copy_(to)


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


def _fake(
    x: Tensor,
    weights: Tensor | None,
    skip_nan: bool,
    count: Tensor,
    origin: Tensor,
    total: Tensor,
    products: Tensor,
) -> None:
    """Nothing is returned."""


# Kept for the life of the process: a Library that is collected takes its registrations with it.
_registrations = torch.library.Library(NAMESPACE, "FRAGMENT")
_registrations.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_registrations.impl("add_products", reference, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::add_products", _fake, lib=_registrations)
load()


def add_products(
    x: Tensor,
    weights: Tensor | None,
    skip_nan: bool,
    count: Tensor,
    origin: Tensor,
    total: Tensor,
    products: Tensor,
) -> None:
    """The operator, as a function with types."""
    torch.ops.batchnorm.add_products(x, weights, skip_nan, count, origin, total, products)
