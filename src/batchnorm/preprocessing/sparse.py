"""Sparse data: SciPy's CSR and CSC and torch's, never made dense.

Zeros that are not stored count as zeros and are not touched: the moments of a feature are those of its stored values
(two passes, as in ``moments.operator``) merged with those of so many zeros by Chan's formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.sparse import issparse
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.moments import Moments, as_tensor
from batchnorm.moments.blocks import two_sum
from batchnorm.preprocessing.batch import BLOCK_ELEMENTS, Batch, NothingToLearnError

_LAYOUTS = (torch.sparse_csr, torch.sparse_csc)


def is_sparse(X: Any) -> bool:
    """Whether ``X`` is a sparse matrix or tensor, of whatever format."""
    return X.layout != torch.strided if isinstance(X, Tensor) else bool(issparse(X))


@dataclass(frozen=True)
class SparseBatch(Batch):
    """A matrix in compressed form: ``values`` are those stored, from ``starts[i]`` to ``starts[i + 1]`` of line ``i``.

    Lines are rows, or columns where ``by_column``; ``others`` says of each value in which column, or row, it is.
    """

    starts: Tensor = field(kw_only=True)
    others: Tensor = field(kw_only=True)
    shape: tuple[int, int] = field(kw_only=True)
    by_column: bool = field(kw_only=True)

    @property
    def num_rows(self) -> int:
        """The number of samples."""
        return self.shape[0]

    @property
    def num_channels(self) -> int:
        """The number of features."""
        return self.shape[1]

    def stored(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of the stored values, and in which row and column each of them is."""
        # A pass over the features comes with every block: it must not cost more than the block itself.
        step = max(BLOCK_ELEMENTS, self.num_channels)
        for start in range(0, self.values.shape[0], step):
            block = slice(start, min(start + step, self.values.shape[0]))
            edges = torch.tensor([block.start, block.stop - 1], device=self.starts.device, dtype=self.starts.dtype)
            first, last = (torch.searchsorted(self.starts, edges, right=True) - 1).tolist()
            bounds = self.starts[first : last + 2].clamp(block.start, block.stop)
            lines = torch.repeat_interleave(torch.arange(first, last + 1, device=bounds.device), bounds.diff())
            others = self.others[block].to(torch.int64)
            yield (block, others, lines) if self.by_column else (block, lines, others)

    def _zeros(self, weights: Tensor | None) -> Tensor:
        """The weight of the zeros that are not stored, (C,)."""
        if weights is None:
            weights = torch.ones(self.num_rows, dtype=torch.float64, device=self.values.device)
        # The weights of all rows less those of the stored values: the difference may be small beside them, so each sum
        # is taken in two parts, of which the first has few enough bits to be exact.
        unit = torch.ldexp(torch.ones_like(weights[0]), torch.frexp(weights.sum())[1] - 52)
        high = (weights / unit).round() * unit
        parts = torch.stack([high, weights - high, (weights > 0).to(high)], dim=1)
        rest = parts.sum(0).expand(self.num_channels, 3).clone()
        for _, rows, columns in self.stored():
            rest.index_add_(0, columns, parts[rows], alpha=-1)
        return torch.where(rest[:, 2] > 0, (rest[:, 0] + rest[:, 1]).clamp_min(0), 0)

    def moments(self, weights: Tensor | None) -> Moments:
        """The moments of each feature, NaN left out."""
        total = Moments.empty(self.num_channels, self.values.device)
        for block, rows, columns in self.stored():
            total = total.merge(
                _moments(self.values[block], columns, None if weights is None else weights[rows], total)
            )
        nothing = torch.zeros_like(total.mean)
        return total.merge(Moments(self._zeros(weights), nothing, nothing, nothing))

    def extremes(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each feature, NaN left out; +inf and -inf where there is none."""
        low = torch.full((self.num_channels,), torch.inf, dtype=torch.float64, device=self.values.device)
        high = -low
        for block, rows, columns in self.stored():
            x = self.values[block].to(torch.float64)
            counted = ~torch.isnan(x) if weights is None else ~torch.isnan(x) & (weights[rows] > 0)
            low.scatter_reduce_(0, columns, torch.where(counted, x, torch.inf), "amin")
            high.scatter_reduce_(0, columns, torch.where(counted, x, -torch.inf), "amax")
        zeros = self._zeros(weights) > 0
        return torch.where(zeros, low.clamp_max(0), low), torch.where(zeros, high.clamp_min(0), high)

    def first_infinite(self, values: Tensor | None = None) -> tuple[int, int] | None:
        """Row and column of the first infinite value stored, or of other stored ``values``."""
        infinite = torch.isinf(self.values if values is None else values)
        if not bool(infinite.any()):
            return None
        for block, rows, columns in self.stored():
            found = infinite[block].nonzero()
            if len(found):
                return int(rows[found[0, 0]]), int(columns[found[0, 0]])
        return None

    def with_values(self, values: Tensor) -> Any:
        """The matrix with other values in the same places: its format, class and dtype are the source's."""
        source = self.source
        if isinstance(source, Tensor):
            make = torch.sparse_csc_tensor if self.by_column else torch.sparse_csr_tensor
            return make(self.starts.clone(), self.others.clone(), values, self.shape, check_invariants=False)
        if values.data_ptr() == self.values.data_ptr() and values.numel():
            return source
        # The places are copied too: whoever sorts or prunes the result must not change what they passed.
        return type(source)((values.numpy(), source.indices.copy(), source.indptr.copy()), shape=source.shape)


def _moments(values: Tensor, columns: Tensor, weights: Tensor | None, like: Moments) -> Moments:
    """The moments of stored values by column: a first mean, then deviations from it and what they say it missed."""

    def by_column(x: Tensor) -> Tensor:
        return torch.zeros_like(like.mean).index_add_(0, columns, x)

    x = values.to(torch.float64)
    counted = ~torch.isnan(x)
    weight = counted.to(torch.float64) if weights is None else counted * weights
    if weights is not None:
        counted &= weights > 0
    count = by_column(weight)
    divisor = torch.where(count > 0, count, 1)
    anchor = by_column(torch.where(counted, x * weight, 0)) / divisor
    deviation = torch.where(counted, x - anchor[columns], 0)
    weighted = deviation * weight
    rest = by_column(weighted)
    squares = by_column(weighted.mul_(deviation))
    correction = rest / divisor
    mean, mean_low = two_sum(anchor, correction)
    return Moments(count, mean, mean_low, (squares - rest * correction).clamp_min_(0))


def read_sparse(estimator: Any, X: Any, *, reset: bool, check_names: bool, first_row: int) -> SparseBatch:
    """Validate sparse ``X``. Raises InputError where the estimator would fill in the zeros, DtypeError, ShapeError."""
    refusal = estimator._sparse_refusal()
    if refusal is not None:
        raise InputError(
            f"Sparse data was passed: {refusal}; or pass dense data, X.toarray() or of a tensor X.to_dense()"
        )
    if estimator.channel_axis not in (None, 1, -1):
        raise ShapeError(f"sparse data are 2-D, rows of features, got channel_axis={estimator.channel_axis}: use None")
    if isinstance(X, Tensor):
        return _read_tensor(estimator, X, reset, check_names, first_row)
    options = {"accept_sparse": ("csr", "csc"), "dtype": "numeric", "ensure_all_finite": False}
    try:
        matrix = validate_data(estimator, X, reset=reset, **options) if check_names else check_array(X, **options)
    except ValueError as error:
        text = str(error).partition("\n")[0]
        if "with 0 sample(s)" in text:
            raise NothingToLearnError(text) from error
        shape = any(word in text for word in ("sample(s)", "feature(s)", "features, but", "2D"))
        raise (ShapeError if shape else InputError)(text) from error
    if not matrix.has_canonical_format:  # a value in two parts, which are meant to be added
        matrix = matrix.copy()
        matrix.sum_duplicates()
    values = as_tensor(matrix.data)
    return SparseBatch(
        values,
        matrix,
        1,
        matrix is X and matrix.data.flags.writeable and matrix.data.ctypes.data == values.data_ptr(),
        first_row,
        starts=as_tensor(matrix.indptr),
        others=as_tensor(matrix.indices),
        shape=(int(matrix.shape[0]), int(matrix.shape[1])),
        by_column=matrix.format == "csc",
    )


def _read_tensor(estimator: Any, X: Tensor, reset: bool, check_names: bool, first_row: int) -> SparseBatch:
    if X.layout not in _LAYOUTS:
        raise DtypeError(f"Sparse data was passed as a tensor of {X.layout}: expected CSR or CSC, X.to_sparse_csr()")
    if X.ndim != 2 or X.dense_dim() or 0 in X.shape:
        raise ShapeError(f"expected a sparse 2-D tensor with at least one row and one column, got {tuple(X.shape)}")
    if check_names:
        validate_data(estimator, X, reset=reset, skip_check_array=True, ensure_2d=False)
    by_column = X.layout == torch.sparse_csc
    return SparseBatch(
        X.values().detach(),
        X,
        1,
        False,
        first_row,
        starts=X.ccol_indices() if by_column else X.crow_indices(),
        others=X.row_indices() if by_column else X.col_indices(),
        shape=(X.shape[0], X.shape[1]),
        by_column=by_column,
    )
