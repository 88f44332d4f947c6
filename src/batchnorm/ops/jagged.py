"""Nested tensors (jagged layout): rows of different lengths as one dense batch that holds every value once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import InputError, ShapeError


def channels(nested: Tensor) -> int:
    """The number of channels: dimension 1, or where that is the ragged one, the last."""
    _check(nested)
    return nested.size(-1 if _ragged(nested) == 1 else 1)


class Packed:
    """A nested input as ``x`` with ``mask``, in a shape that every normalization takes.

    Two orders of dimensions occur: (N, C, *, ragged, *), as of a padded tensor, and (N, ragged, *, C), as of a sequence
    model. The ragged dimension holds the rows one after the other and takes the place of N in the second; in the first
    N is 1 and nothing has to be moved.
    """

    def __init__(self, nested: Tensor, by_row: bool) -> None:
        """``by_row``: the ragged dimension must take the place of N, because something differs from row to row."""
        _check(nested)
        self.ragged, self.shape = _ragged(nested), nested.shape
        self.offsets: Tensor = _method(nested, "offsets")()
        self.lengths: Tensor | None = _method(nested, "lengths")()
        self.channels_last = self.ragged == 1
        self.by_row = by_row or self.channels_last
        self.x = self.pack(nested)
        self.mask = None if self.lengths is None else self._real(self.lengths)

    def pack(self, nested: Tensor) -> Tensor:
        """The values, (positions, C, *) or (1, C, *)."""
        if not nested.is_nested or nested.shape != self.shape:
            raise ShapeError(f"expected a nested tensor of the input's shape {self.shape}, got {nested.shape}")
        values: Tensor = nested.values()
        if self.channels_last:
            return values.movedim(-1, 1)
        return values.movedim(self.ragged - 1, 0) if self.by_row else values.unsqueeze(0)

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`pack`."""
        if self.channels_last:
            values = y.movedim(1, -1)
        else:
            values = y.movedim(0, self.ragged - 1) if self.by_row else y.squeeze(0)
        nested = torch.nested.nested_tensor_from_jagged
        result: Tensor = nested(values, self.offsets, self.lengths, jagged_dim=self.ragged)
        return result

    def per_position(self, coefficient: Tensor | None) -> Tensor | None:
        """A coefficient of each row, (N, C), as one of each position."""
        if coefficient is None or coefficient.dim() != 2:
            return coefficient
        rows = self.offsets.numel() - 1
        if coefficient.size(0) != rows:
            raise ShapeError(f"expected weight and bias for {rows} rows, got {list(coefficient.shape)}")
        return coefficient[self._row().clamp(max=rows - 1)]

    def _row(self) -> Tensor:
        positions = torch.arange(self.x.size(0 if self.by_row else self.ragged), device=self.x.device)
        return torch.searchsorted(self.offsets, positions, right=True) - 1

    def _real(self, lengths: Tensor) -> Tensor:
        # A view by torch.nested.narrow keeps values between its rows that belong to none.
        row = self._row()
        inside = row.clamp(max=lengths.numel() - 1)
        within = torch.arange(row.numel(), device=row.device) - self.offsets[inside]
        real = (row < lengths.numel()) & (within < lengths[inside])
        at = 0 if self.by_row else self.ragged - 1
        shape = [1] * (self.x.dim() - 1)
        shape[at] = row.numel()
        return real.reshape(shape).expand(self.x.size(0), *self.x.shape[2:])


def _ragged(nested: Tensor) -> int:
    index: int = nested._ragged_idx  # type: ignore[attr-defined]
    return index


def _method(nested: Any, name: str) -> Any:
    return getattr(nested, name)


def _check(nested: Tensor) -> None:
    if nested.layout != torch.jagged:
        raise InputError("expected a nested tensor with layout=torch.jagged, got layout=torch.strided")
    if nested.dim() < 3:
        raise ShapeError(f"expected a nested tensor with a channel and a ragged dimension, got {nested.shape}")
