"""Products of the channels of a group, over a tensor in memory: blocks that stay in cache, and no copy of the whole.

The tensor is seen as *rows* (M, C), as channels-last memory and 2-D input have it, or sample by sample as *planes*
(N, C, L), as contiguous memory has it; either way without moving anything. Each block is centred into one buffer, which
all blocks share, as (m, C) or (C, m), so that a group's channels are one matrix of a batched product. Sums over blocks
are float64 (float32 on devices without).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.ops.schema import runs, statistics_dtype

# A block of float32 takes 1 MB: with its gradient and product it stays in cache, and the products fill the cores.
_BLOCK_ELEMENTS = 2**18
# Below, products are float64: what they cost is their calls.
_SMALL_ELEMENTS = 2**16


class Groups:
    """How x (N, C, *) of ``group_size`` channels a group is cut about its ``mean`` (C,), and the dtype of its products.

    That is float64 for float64 and for small tensors, else float32. Products are about ``shift``, the mean rounded to
    that dtype; ``rest`` (C,) is what the rounding left, None where it left nothing.
    """

    def __init__(self, x: Tensor, group_size: int, mean: Tensor, mask: Tensor | None) -> None:
        self.by_rows = runs(x)[0]
        self.like = x if self.by_rows else x.contiguous()
        self.channels, self.size = x.size(1), group_size
        self.groups = self.channels // group_size
        self.wide = statistics_dtype(x.device)
        small = x.numel() <= _SMALL_ELEMENTS
        self.dtype = self.wide if small or x.dtype == self.wide else torch.float32
        self.x = self.view(x)
        self.shift = mean if mean.dtype == self.dtype else mean.to(self.dtype)
        self.rest = None if self.dtype == self.wide else mean - self.shift
        self._padding: Tensor | None = None
        if mask is not None:
            self._padding = ~(mask.reshape(-1, 1) if self.by_rows else mask.reshape(mask.size(0), 1, -1))
        items, blocks = self.x.size(0), max(1, -(-x.numel() // _BLOCK_ELEMENTS))
        length = max(1, -(-items // blocks))
        self._parts = [slice(start, start + length) for start in range(0, items, length)] if x.numel() else []
        self._buffers: list[Tensor | None] = [None, None, None]
        # Of a tensor that is one block, what has been made of it and of its gradient.
        self._whole: list[Tensor | None] = [None, None]

    def view(self, tensor: Tensor) -> Tensor:
        """The rows or planes of a tensor of x's shape; a view where it lies in memory as x does."""
        if tensor.dim() == 2 and self.by_rows:
            return tensor
        if self.by_rows:
            return tensor.movedim(1, -1).reshape(-1, self.channels)
        return tensor.reshape(tensor.size(0), self.channels, -1 if tensor.numel() else 0)

    def grams(self) -> Tensor:
        """sum (x - shift)(x - shift)^T, (g, G, G)."""
        total: Tensor | None = None
        for _, centred in self._centred():
            matrix = self._matrices(centred)
            total = self._added(total, torch.bmm(matrix, matrix.mT))
        return self._zeros() if total is None else total

    def cross(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """sum grad (x - shift)^T, (g, G, G), and sum grad, (C,), for the :meth:`view` of a gradient."""
        total = sums = None
        for part, centred in self._centred():
            block = self._gradient(grad[part])
            total = self._added(total, torch.bmm(self._matrices(block), self._matrices(centred).mT))
            sums = self._added(sums, block.sum(0 if self.by_rows else -1))
        if total is None or sums is None:
            return self._zeros(), self.shift.new_zeros(self.channels, dtype=self.wide)
        return total, sums

    def apply(self, matrix: Tensor, offset: Tensor) -> Tensor:
        """matrix (x - shift) + offset for each group, with x's dtype and layout."""
        out = torch.empty_like(self.like)
        to, matrix, offset = self.view(out), matrix.to(self.dtype), self._over(offset.to(self.dtype))
        for part, centred in self._centred():
            self._put(to[part], self._product(matrix, centred), offset)
        return out

    def apply_both(self, first: Tensor, grad: Tensor, matrix: Tensor | None, offset: Tensor | None) -> Tensor:
        """first grad + matrix (x - shift) + offset for each group, zero where the mask is False."""
        out = torch.empty_like(self.like)
        to, first = self.view(out), first.to(self.dtype)
        matrix = None if matrix is None else matrix.to(self.dtype)
        offset = None if offset is None else self._over(offset.to(self.dtype))
        for part in self._parts:
            product = self._product(first, self._gradient(grad[part]))
            if matrix is not None:
                self._product(matrix, self._centre(part), product)
            self._put(to[part], product, offset)
            if self._padding is not None:
                to[part].masked_fill_(self._padding[part], 0)
        return out

    def _centred(self) -> Iterator[tuple[slice, Tensor]]:
        for part in self._parts:
            yield part, self._centre(part)

    def _centre(self, part: slice) -> Tensor:
        if self._whole[0] is not None:
            return self._whole[0]
        block, shift = self.x[part], self._over(self.shift)
        if len(self._parts) == 1 and self.by_rows:
            centred = block - shift if block.dtype == self.dtype else block.to(self.dtype).sub_(shift)
        else:
            centred = self._room(block, 0)
            torch.sub(block, shift, out=self._as_block(centred, block))
        if self._padding is not None:
            self._as_block(centred, block).masked_fill_(self._padding[part], 0)  # whatever stands there, NaN too
        if len(self._parts) == 1:
            self._whole[0] = centred
        return centred

    def _gradient(self, block: Tensor) -> Tensor:
        if self._whole[1] is not None:
            return self._whole[1]
        if self.by_rows:
            matrix = block.to(self.dtype)
        else:
            matrix = self._room(block, 1)
            self._as_block(matrix, block).copy_(block)
        if len(self._parts) == 1:
            self._whole[1] = matrix
        return matrix

    def _room(self, block: Tensor, which: int) -> Tensor:
        buffer = self._buffer(which, block)
        shape = block.shape if self.by_rows else (self.channels, block.size(0) * block.size(2))
        return buffer[: block.numel()].view(shape)

    def _buffer(self, which: int, block: Tensor) -> Tensor:
        buffer = self._buffers[which]
        if buffer is None:
            buffer = self._buffers[which] = torch.empty(block.numel(), dtype=self.dtype, device=block.device)
        return buffer

    def _as_block(self, matrix: Tensor, block: Tensor) -> Tensor:
        """The matrix of a block, seen in the block's shape."""
        return matrix if self.by_rows else matrix.view(self.channels, block.size(0), -1).transpose(0, 1)

    def _matrices(self, matrix: Tensor) -> Tensor:
        """(m, C) or (C, m) as (g, G, m), a view."""
        if self.by_rows:
            return matrix.view(-1, self.groups, self.size).permute(1, 2, 0)
        return matrix.view(self.groups, self.size, -1)

    def _product(self, matrix: Tensor, block: Tensor, to: Tensor | None = None) -> Tensor:
        """matrix times block, added to ``to``: (g, m, G) for rows, (g, G, m) for planes."""
        factors = (self._matrices(block).mT, matrix.mT) if self.by_rows else (matrix, self._matrices(block))
        if to is not None:
            return to.baddbmm_(*factors)
        if len(self._parts) == 1:
            return torch.bmm(*factors)
        # Fresh memory for each block would cost more in page faults than the product.
        shape = (self.groups, -1, self.size) if self.by_rows else (self.groups, self.size, -1)
        return torch.bmm(*factors, out=self._buffer(2, block)[: block.numel()].view(shape))

    def _put(self, out: Tensor, product: Tensor, offset: Tensor | None) -> None:
        if self.by_rows:
            out = out.view(-1, self.groups, self.size)
            product, offset = product.transpose(0, 1), None if offset is None else offset.view(self.groups, self.size)
        else:
            product = self._as_block(product, out)
        if offset is None:
            out.copy_(product)
        else:
            torch.add(product, offset, out=out)

    def _over(self, channels: Tensor) -> Tensor:
        return channels if self.by_rows else channels.unsqueeze(-1)

    def _added(self, total: Tensor | None, block: Tensor) -> Tensor:
        block = block.to(self.wide)
        return block if total is None else total.add_(block)

    def _zeros(self) -> Tensor:
        return self.shift.new_zeros(self.groups, self.size, self.size, dtype=self.wide)
