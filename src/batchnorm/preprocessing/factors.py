"""Solved whitenings: applied in factors, so that a matrix of features x features is made only where it saves work."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.preprocessing.memory import available_memory, refuse_beyond_memory


class Whitening(Protocol):
    """A solution, float64: ``y = W d`` and ``d = D y`` for deviations ``d`` from the mean.

    ``whitening`` is ``W`` (outputs, features) and ``dewhitening`` ``D`` (features, outputs), its inverse on the
    directions kept. ``components`` (k, features): the directions kept, as rows, by falling variance; ``variance`` and
    ``ratio`` (k,): the data's variance along each and its share of the total. Empty (0, ...) for Cholesky, which has
    none. ``rank``: the number of directions with variance. ``intensity``: of the shrinkage.

    ``forward`` whitens deviations from the mean, (n, features) to (n, outputs), and ``backward`` makes deviations
    again; both in float64, on the device of all, into ``out``, which they give back, and both may write into ``rows``.
    """

    @property
    def whitening(self) -> Tensor: ...
    @property
    def dewhitening(self) -> Tensor: ...
    @property
    def components(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    @property
    def ratio(self) -> Tensor: ...
    @property
    def rank(self) -> int: ...
    @property
    def intensity(self) -> float: ...
    @property
    def num_outputs(self) -> int: ...
    def to(self, device: torch.device) -> Self: ...
    def forward(self, rows: Tensor, out: Tensor) -> Tensor: ...
    def backward(self, rows: Tensor, out: Tensor) -> Tensor: ...
    def to_dict(self) -> dict[str, Tensor]: ...


def moved(solution: Any, device: torch.device) -> Any:
    """A dataclass with all of its tensors on ``device``."""
    values = {f.name: getattr(solution, f.name) for f in fields(solution)}
    return replace(solution, **{name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True, eq=False)
class MatrixWhitening:
    """A whitening given by its matrices."""

    whitening: Tensor
    dewhitening: Tensor
    components: Tensor
    variance: Tensor
    ratio: Tensor
    rank: int
    intensity: float

    @property
    def num_outputs(self) -> int:
        """The width of what comes out."""
        return self.whitening.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self if device == self.whitening.device else moved(self, device)

    def forward(self, rows: Tensor, out: Tensor) -> Tensor:
        """Whiten ``rows``."""
        return torch.mm(rows, self.whitening.T, out=out)

    def backward(self, rows: Tensor, out: Tensor) -> Tensor:
        """Undo ``forward``."""
        return torch.mm(rows, self.dewhitening.T, out=out)

    def to_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, for saving."""
        names = ("whitening", "dewhitening", "components", "variance", "ratio")
        numbers = torch.tensor([float(self.rank), self.intensity], dtype=torch.float64)
        return {"numbers": numbers, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, eq=False)
class EigenWhitening:
    """``W = diag(1 / deviation) components diag(1 / scale)``; with ``rotate_back`` ``components^T`` in front of that.

    ``deviation`` (k,): the deviation along each component that is brought to 1; ``scale`` (features,): what features
    are divided by first. ``others``: with ``rotate_back``, the deviation of all directions that are not among the
    components (shrinkage gives them one); 0 where they are projected out.
    """

    components: Tensor
    variance: Tensor
    ratio: Tensor
    deviation: Tensor
    scale: Tensor
    others: float
    rotate_back: bool
    rank: int
    intensity: float

    @property
    def num_outputs(self) -> int:
        """The width of what comes out."""
        return self.components.shape[1 if self.rotate_back else 0]

    @cached_property
    def scaled(self) -> bool:
        """Whether features are divided by anything but 1."""
        return bool((self.scale != 1).any())

    def _inner(self, outer: Tensor | None, factor: Tensor, others: float) -> Tensor:
        """``components^T diag(factor) components`` and ``others`` times the identity on the remaining directions."""
        p = self.components.shape[1]
        refuse_beyond_memory(8 * p * p, f"a matrix of {p} x {p}", "transform applies its factors without it")
        matrix = torch.zeros(p, p, dtype=torch.float64, device=self.components.device)
        for rows, weights in zip(self.components.split(512), (factor - others).split(512), strict=True):
            matrix.addmm_(rows.T, rows * weights.unsqueeze(1))
        matrix.diagonal().add_(others)
        return matrix if outer is None else matrix.mul_(outer)

    @cached_property
    def _square(self) -> Tensor:
        """``W`` of a form that rotates back, kept: making it costs as much as whitening as many samples as features."""
        others = 1 / self.others if self.others else 0.0
        return self._inner(1 / self.scale if self.scaled else None, self.deviation.reciprocal(), others)

    @property
    def whitening(self) -> Tensor:
        """``W``, (outputs, features). Raises InputError where it exceeds the memory."""
        if self.rotate_back:
            return self._square
        return self.components / self.deviation.unsqueeze(1) / self.scale

    @property
    def dewhitening(self) -> Tensor:
        """``D``, (features, outputs). Raises InputError where it exceeds the memory."""
        if self.rotate_back:
            return self._inner(self.scale.unsqueeze(1), self.deviation, self.others)
        return (self.components * self.deviation.unsqueeze(1)).T * self.scale.unsqueeze(1)

    @cached_property
    def factored(self) -> bool:
        """Whether a form that rotates back is applied as two products of k columns, not as one matrix."""
        k, p = self.components.shape
        available = available_memory()
        return 2 * k < p or (available is not None and 8 * p * p > available)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self if device == self.components.device else moved(self, device)

    def forward(self, rows: Tensor, out: Tensor) -> Tensor:
        """Whiten ``rows``."""
        if self.rotate_back and not self.factored:
            return torch.mm(rows, self._square.T, out=out)
        components, factor = self.components, self.deviation.reciprocal()
        if self.scaled:
            rows.div_(self.scale)
        if not self.rotate_back:
            return torch.mm(rows, components.T, out=out).mul_(factor)
        others = 1 / self.others if self.others else 0.0
        torch.mm((rows @ components.T).mul_(factor - others), components, out=out)
        return out.add_(rows, alpha=others) if others else out

    def backward(self, rows: Tensor, out: Tensor) -> Tensor:
        """Undo ``forward`` on the directions kept."""
        components, factor = self.components, self.deviation
        if self.rotate_back:
            torch.mm((rows @ components.T).mul_(factor - self.others), components, out=out)
            if self.others:
                out.add_(rows, alpha=self.others)
        else:
            torch.mm(rows.mul_(factor), components, out=out)
        return out.mul_(self.scale) if self.scaled else out

    def to_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, for saving."""
        names = ("components", "variance", "ratio", "deviation", "scale")
        numbers = torch.tensor(
            [float(self.rank), self.intensity, float(self.rotate_back), self.others], dtype=torch.float64
        )
        return {"numbers": numbers, **{name: getattr(self, name) for name in names}}


_MATRICES = {"whitening", "dewhitening", "components", "variance", "ratio"}
_FACTORS = {"components", "variance", "ratio", "deviation", "scale"}


def read_whitening(tensors: dict[str, Tensor]) -> Whitening:
    """Read what ``to_dict`` gave. Raises InputError where tensors are missing or superfluous."""
    rest = {name: tensor for name, tensor in tensors.items() if name != "numbers"}
    numbers = tensors["numbers"].tolist() if "numbers" in tensors else []
    if set(rest) == _MATRICES and len(numbers) == 2:
        return MatrixWhitening(**rest, rank=int(numbers[0]), intensity=numbers[1])
    if set(rest) == _FACTORS and len(numbers) == 4:
        rank, intensity, back, others = numbers
        return EigenWhitening(**rest, others=others, rotate_back=bool(back), rank=int(rank), intensity=intensity)
    raise InputError(f"a Whitener needs its solution's tensors, got {sorted(tensors)}")


def _block_rows(width: int, device: torch.device) -> int:
    """How many samples to multiply at a time: a block that stays in the second-level cache, unless samples are wide.

    A product of few rows costs as much as reading the matrix; on an accelerator, as starting it.
    """
    if device.type != "cpu":
        return max(1, 2**24 // width)
    return max(1, 2**17 // width, min(256, 2**22 // width))


def apply(
    solution: Whitening, x: Tensor, axis: int, mean: Tensor, mean_low: Tensor, dtype: torch.dtype, inverse: bool
) -> Tensor:
    """Whiten ``x`` (N, C, *) along ``axis``, or undo that: a new tensor of ``dtype``, on the device of ``x``.

    In float64 throughout and rounded once: in float32 the products of many features add up errors, even where the data
    are nearly white.
    """
    device, samples, width = x.device, x.shape[0], x.shape[axis]
    solution, mean, low = solution.to(device), mean.to(device), mean_low.to(device)
    outputs = mean.shape[0] if inverse else solution.num_outputs
    shape = list(x.shape)
    shape[axis] = outputs
    out = torch.empty(shape, dtype=dtype, device=device)
    positions = max(1, x.numel() // (samples * width))
    step = min(samples, max(1, _block_rows(max(width, outputs), device) // positions))
    # One buffer for all blocks: fresh memory would cost as much as the arithmetic on it.
    rows, result = (torch.empty(step * positions, n, dtype=torch.float64, device=device) for n in (width, outputs))
    for start in range(0, samples, step):
        block = x[start : start + step].movedim(axis, -1)
        count = block.numel() // width
        centred, y = rows[:count], result[:count]
        centred.view(block.shape).copy_(block)
        if inverse:
            solution.backward(centred, y).add_(low).add_(mean)
        else:
            solution.forward(centred.sub_(mean).sub_(low), y)
        out[start : start + step] = y.view(*block.shape[:-1], outputs).movedim(-1, axis)
    return out
