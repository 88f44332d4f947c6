"""Layers that can take a batch norm up, and the algebra of it, in float64 and rounded once.

Before the batch norm (``s W x + (s b + t)``), and behind it (``W (s x + t) + b = (W s) x + (b + W t)``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Write = Callable[[], None]
"""Writes new numbers, when all of a batch norm's layers are known to take it up."""


class Left(Exception):  # noqa: N818 - no error: it says why a batch norm stays
    """Why a batch norm is left as it is."""


@dataclass
class Taker:
    """A layer ``y = W x + b``, per group of channels and summed over the taps of a kernel.

    Attributes:
        name: its path.
        kind: its class or operator, for messages.
        weight: (outputs, inputs of a group, *kernel), or if ``transposed`` (inputs, outputs of a group, *kernel).
        bias: (outputs,), or None.
        groups: in which channels are not mixed with others.
        axis: of the channels, counted from the end in input and output.
        border: why a constant added to its input is no constant added to its output, or None where it is.
        refusal: why its numbers must not be changed, or None.
        write: takes the new weight, and the new bias.
        transposed: whether it is a transposed convolution.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    groups: int
    axis: int
    border: str | None
    refusal: str | None
    write: Callable[[Tensor, Tensor | None], None]
    transposed: bool = False

    @property
    def label(self) -> str:
        """Path and kind."""
        return f"{self.name or 'the model'} ({self.kind})"

    @property
    def outputs(self) -> int:
        """Its channels."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """The channels that it reads."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    def by_groups(self) -> Tensor:
        """The weight as (groups, outputs of one, inputs of one, taps), in float64."""
        weight = self.weight.detach().cpu().double()  # not every device has float64
        rows = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return rows.transpose(1, 2) if self.transposed else rows

    def offset(self) -> Tensor:
        """The bias in float64, 0 where there is none."""
        if self.bias is not None:
            return self.bias.detach().cpu().double()
        return torch.zeros(self.outputs, dtype=torch.float64)

    def put(self, rows: Tensor, offset: Tensor | None) -> Write:
        """What writes what :meth:`by_groups` and :meth:`offset` became; None leaves the bias as it is.

        Raises:
            Left: the dtype does not hold the new numbers.
        """
        flat = (rows.transpose(1, 2) if self.transposed else rows).reshape(self.weight.shape)
        weight = torch.empty_like(self.weight).copy_(flat)  # in the weight's memory format
        bias = self.bias
        if offset is not None:
            bias = offset.to(self.weight.device, self.weight.dtype if self.bias is None else self.bias.dtype)
        for new in (weight, bias):
            if new is not None and not bool(torch.isfinite(new).all()):
                raise Left(f"{self.label} would get numbers that {new.dtype} does not hold")

        def write() -> None:
            self.write(weight, None if offset is None else bias)
            self.weight, self.bias = weight, bias

        return write


def scale_outputs(taker: Taker, scale: Tensor, shift: Tensor) -> Write:
    """y becomes scale y + shift; both (outputs,)."""
    rows = taker.by_groups()
    return taker.put(rows * scale.reshape(taker.groups, -1, 1, 1), taker.offset() * scale + shift)


def mix_outputs(taker: Taker, matrix: Tensor, shift: Tensor) -> Write:
    """y becomes matrix y + shift, for a matrix (outputs, outputs) that mixes no channels of different groups."""
    rows = taker.by_groups()
    groups, outputs = rows.shape[:2]
    blocks = matrix.reshape(groups, outputs, groups, outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if not torch.equal(torch.block_diag(*blocks), matrix):
        raise Left(f"it mixes channels of different groups of {taker.label}")
    return taker.put(torch.einsum("gpo,goik->gpik", blocks, rows), matrix @ taker.offset() + shift)


def scale_inputs(taker: Taker, scale: Tensor, shift: Tensor) -> Write:
    """What it did of scale x + shift it does of x; both (inputs,)."""
    rows = taker.by_groups()
    scale = scale.reshape(taker.groups, 1, -1, 1)
    if bool((shift == 0).all()):
        return taker.put(rows * scale, None)
    if taker.border is not None:
        raise Left(f"{taker.label}, behind it, cannot take its shift up: {taker.border}")
    through = (rows * shift.reshape(taker.groups, 1, -1, 1)).sum((2, 3)).flatten()
    return taker.put(rows * scale, taker.offset() + through)
