"""What a Whitener learns: sums of products of features, or as long as they are fewer than features the samples.

A sum of products takes p x p numbers for p features, n samples take n x p, and the eigenvectors of their covariance can
be had from either (see ``gram``). Samples are kept until there are p of them and then become products: a batch of few
rows costs little, and no matrix is made before the data fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.moments import Moments, Scatter, ScatterSum
from batchnorm.moments.blocks import prepare
from batchnorm.preprocessing.memory import refuse_beyond_memory
from batchnorm.preprocessing.shrinkage import FourthMoments

# Once there are products, this many samples more are worth adding them: a product of rows then costs more than passing
# over the matrix that it is added to.
_WORTH_ADDING = 1024
# A float64 copy of a block of samples stays in a core's second-level cache, unless samples are wide.
_BLOCK_ELEMENTS = 2**18
_BLOCK_MIN_ROWS = 32


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples without NaN as they came: ``values`` (n, features) float32 or float64, ``weights`` (n,) float64."""

    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, x: Tensor, channel_axis: int, weights: Tensor | None) -> Self:
        """Copies of the complete samples of ``x`` that have weight."""
        width = x.shape[channel_axis]
        exact = x.dtype if x.dtype in (torch.float32, torch.float64) else _exact(x.dtype)
        parts = [(rows.to(exact), w) for rows, w in complete_rows(x, channel_axis, weights)]
        if not parts:
            return cls(x.new_empty((0, width), dtype=exact), x.new_empty(0, dtype=torch.float64))
        return cls(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))

    def to(self, device: torch.device | str) -> Self:
        """The same samples on another device."""
        return type(self)(self.values.to(device), self.weights.to(device))


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The smaller one of float32 and float64 that holds every value of ``dtype``."""
    narrow = (torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16)
    return torch.float32 if dtype in narrow else torch.float64


def complete_rows(
    x: Tensor, channel_axis: int, weights: Tensor | None, elements: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The channel vectors of ``x`` as rows (n, C) and their weights (n,), in blocks; not those with NaN, or weight 0.

    A view of ``x`` where nothing is left out.
    """
    data, w, axis = prepare(x, channel_axis, weights, None)
    step = max(_BLOCK_MIN_ROWS, (elements or _BLOCK_ELEMENTS) * data.shape[0] // max(1, data.numel()))
    for start in range(0, data.shape[0], step):
        block = data[start : start + step]
        rows = block.movedim(axis, -1).reshape(-1, data.shape[axis])
        if w is None:
            row_weights = torch.ones(rows.shape[0], dtype=torch.float64, device=x.device)
        else:
            shape = [1 if a == axis else size for a, size in enumerate(block.shape)]
            row_weights = w[start : start + step].expand(shape).reshape(-1)
            if not bool((row_weights > 0).all()):
                rows, row_weights = rows[row_weights > 0], row_weights[row_weights > 0]
        # One sum says whether to look closer: it is NaN wherever a value is.
        if rows.is_floating_point() and bool(torch.isnan(rows.sum())):
            complete = ~torch.isnan(rows).any(dim=1)
            rows, row_weights = rows[complete], row_weights[complete]
        if rows.shape[0]:
            yield rows, row_weights


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Moments of each feature, and ``products`` and ``rows`` which together hold the products of features.

    ``products``: a Scatter of the samples that are in it; None before there are any. With ``fourth`` it is
    FourthMoments, of ``"pairs"`` of features or of the samples' ``"norms"``.
    ``rows``: the samples that are not. ``keep``: how many samples are kept as such before there are products; None for
    all. Objects are not changed once made.
    """

    moments: Moments
    products: Scatter | FourthMoments | None
    rows: tuple[Rows, ...] = ()
    fourth: str | None = None
    keep: int | None = 0

    @classmethod
    def from_batch(
        cls, x: Tensor, *, channel_axis: int, weights: Tensor | None, fourth: str | None, keep: int | None
    ) -> Self:
        """Of the channel vectors of ``x`` that hold no NaN. ``keep`` and ``fourth`` as in the class.

        Raises InputError where the products, or the samples to be kept, need more memory than there is.
        """
        width = x.shape[channel_axis]
        if keep is not None and x.numel() // width >= max(1, keep):
            refuse_products(width, fourth)
            products = _products(x, channel_axis, weights, fourth)
            return cls(products.moments(), products, (), fourth, keep)
        remedy = 'pass n_components=k with solver="randomized", which keeps none'
        refuse_beyond_memory(12 * x.numel(), f"keeping samples, here of shape {tuple(x.shape)},", remedy)
        rows = Rows.of(x, channel_axis, weights)
        moments = Moments.from_batch(rows.values, weights=rows.weights).to("cpu")
        return cls(moments, None, (rows,) if rows.values.shape[0] else (), fourth, keep)

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.moments.num_features

    @property
    def count(self) -> Tensor:
        """The number of samples, or the sum of their weights, ()."""
        return self.moments.count[0]

    @property
    def num_rows(self) -> int:
        """How many samples are kept as such."""
        return sum(rows.values.shape[0] for rows in self.rows)

    def merge(self, other: SecondMoments) -> SecondMoments:
        """The same of both sets of samples together. Raises ShapeError, DtypeError, InputError (memory)."""
        moments = self.moments.merge(other.moments)
        mine, theirs = self.products, other.products
        products: Any = mine if theirs is None else theirs if mine is None else cast("Any", mine).merge(theirs)
        fourth = self.fourth if self.fourth == other.fourth else "norms"
        merged = replace(self, moments=moments, products=products, rows=self.rows + other.rows, fourth=fourth)
        if self.keep is None and products is None:
            return merged
        enough = self.keep or 0
        if products is not None:
            enough = min(self.num_features, _WORTH_ADDING)
        return replace(merged, products=merged.whole(), rows=()) if merged.num_rows >= enough else merged

    def whole(self) -> Scatter | FourthMoments:
        """The products of all samples, those kept as such included. Raises InputError where memory is too small."""
        if not self.rows and self.products is not None:
            return self.products
        refuse_products(self.num_features, self.fourth)
        total: Any = self.products
        for rows in _joined(self.rows):
            added: Any = _products(rows.values, 1, rows.weights, self.fourth)
            total = added if total is None else total.merge(added)
        return total

    def to_dict(self) -> dict[str, Tensor]:
        """Everything as plain tensors by name; once there are products, samples that were not added yet are."""
        moments = {f"moments.{name}": tensor for name, tensor in self.moments.to_dict().items()}
        if self.products is not None:
            return self.whole().to_dict() | (moments if self.rows else {})
        values = [rows.values.cpu() for rows in self.rows] or [torch.empty(0, self.num_features)]
        weights = [rows.weights.cpu() for rows in self.rows] or [torch.empty(0, dtype=torch.float64)]
        return moments | {"rows.values": torch.cat(values), "rows.weights": torch.cat(weights)}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor], *, fourth: str | None, keep: int | None) -> Self:
        """Read what :meth:`to_dict` gave. Raises InputError where tensors are missing or superfluous."""
        parts: dict[str, dict[str, Tensor]] = {"moments": {}, "rows": {}, "": {}}
        for name, tensor in tensors.items():
            group, dot, rest = name.rpartition(".")
            parts.setdefault(group, {})[rest if dot else name] = tensor
        moments, rows, own = parts["moments"], parts["rows"], parts[""]
        if own and not rows:
            products = (FourthMoments if "fourth" in own else Scatter).from_dict(own)
            fourth = ("pairs" if products.pairs else "norms") if isinstance(products, FourthMoments) else None
            return cls(Moments.from_dict(moments) if moments else products.moments(), products, (), fourth, keep)
        if own or set(rows) != {"values", "weights"} or rows["values"].shape[:1] != rows["weights"].shape:
            raise InputError(
                f"a Whitener needs products or rows.values and as many rows.weights, got {sorted(tensors)}"
            )
        kept = (Rows(rows["values"], rows["weights"]),) if len(rows["values"]) else ()
        return cls(Moments.from_dict(moments), None, kept, fourth, keep)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle is to be read where there is no accelerator, too.
        return {**self.__dict__, "rows": tuple(rows.to("cpu") for rows in self.rows)}


class Growth:
    """SecondMoments in the making: the parts of a stream are added to one matrix in place.

    ``stats`` has products, and no fourth moments; with ``owned`` its matrix is taken over, and it is used up.
    """

    def __init__(self, stats: SecondMoments, *, owned: bool) -> None:
        self.keep = stats.keep
        self.sum = ScatterSum.resume(cast("Scatter", stats.products), copy=not owned)
        self.waiting = list(stats.rows)

    @staticmethod
    def possible(stats: Any) -> bool:
        """Whether ``stats`` can grow."""
        return isinstance(stats, SecondMoments) and isinstance(stats.products, Scatter) and stats.fourth is None

    @property
    def moments(self) -> Moments:
        """Each feature's own moments, but for samples that wait."""
        return self.sum.moments()

    def add(self, x: Tensor, channel_axis: int, weights: Tensor | None) -> bool:
        """Add the channel vectors of ``x``; False where they only wait for more of their kind."""
        worth = min(self.sum.num_features, _WORTH_ADDING)
        if 4 * x.numel() < worth * x.shape[channel_axis]:
            self.waiting.append(Rows.of(x, channel_axis, weights))
            if sum(rows.values.shape[0] for rows in self.waiting) >= worth:
                self._add_waiting()
            return False
        self.sum.add(x, channel_axis=channel_axis, weights=weights, skip_nan=True)
        return True

    def _add_waiting(self) -> None:
        for rows in _joined(self.waiting):
            self.sum.add(rows.values, weights=rows.weights)
        self.waiting = []

    def result(self) -> SecondMoments:
        """What was learned; this object is used up."""
        self._add_waiting()
        products = self.sum.result(copy=False)
        return SecondMoments(products.moments(), products, (), None, self.keep)


def _joined(parts: Sequence[Rows]) -> Iterator[Rows]:
    """The same samples in as few pieces as their dtypes and devices allow."""
    alike: dict[Any, list[Rows]] = {}
    for rows in parts:
        alike.setdefault((rows.values.device, rows.values.dtype), []).append(rows)
    for group in alike.values():
        yield Rows(torch.cat([r.values for r in group]), torch.cat([r.weights for r in group]))


def _products(x: Tensor, channel_axis: int, weights: Tensor | None, fourth: str | None) -> Scatter | FourthMoments:
    if fourth is None:
        return Scatter.from_batch(x, channel_axis=channel_axis, weights=weights, skip_nan=True).to("cpu")
    return FourthMoments.from_batch(
        x, channel_axis=channel_axis, weights=weights, skip_nan=True, pairs=fourth == "pairs"
    ).to("cpu")


def refuse_products(num_features: int, fourth: str | None) -> None:
    """Raise an InputError where the products of so many features, and what solving takes beside, exceed the memory."""
    # The sums, a copy that the solver consumes, and eigenvectors; third and fourth moments.
    matrices = 5 if fourth == "pairs" else 3
    refuse_beyond_memory(
        matrices * 8 * num_features**2,
        f"whitening by a {num_features} x {num_features} covariance",
        'pass n_components=k with solver="randomized", or fewer features',
    )
