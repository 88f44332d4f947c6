"""Between the columns of an Arrow table and the one array that an estimator takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError, ShapeError

Array = NDArray[Any]


@dataclass(frozen=True)
class Features:
    """``values`` (n, features) of as many ``columns``, or (n, *) of a single column that holds arrays (``tensor``)."""

    values: Array
    columns: list[str]
    tensor: bool
    weights: Array | None = None

    @property
    def names(self) -> list[str] | None:
        """Of the features: the columns', none where these are the entries of arrays."""
        return None if self.tensor else self.columns


def read_features(table: Any, columns: Sequence[str] | None, weights: str | None = None) -> Features:
    """The features and weights in a table with at least one row; ``columns`` None takes all but the weights.

    A null is NaN. Raises InputError for a column that is missing or holds no numbers, ShapeError for ragged arrays.
    """
    have = list(map(str, table.column_names))
    chosen = [name for name in have if name != weights] if columns is None else list(columns)
    missing = [name for name in (*chosen, *([] if weights is None else [weights])) if name not in have]
    if missing:
        raise InputError(f"expected a column {missing[0]!r}, the data have {_listed(have)}")
    if not chosen:
        raise InputError("expected at least one column of features, got none")
    own = None if weights is None else _flat(table.column(weights), weights).astype(np.float64)
    tensors = [name for name in chosen if _holds_arrays(table.column(name).type)]
    if tensors and len(chosen) > 1:
        raise InputError(
            f"expected columns of numbers or a single column of arrays, got arrays in {tensors[0]!r} beside others: "
            f"choose with columns={tensors[0]!r}"
        )
    if tensors:
        return Features(_arrays(table, chosen[0]), chosen, True, own)
    parts = [_flat(table.column(name), name) for name in chosen]
    # Features as rows: each column is copied once, in one piece, and the kernels take any strides.
    values = np.empty((len(parts), table.num_rows), dtype=np.result_type(*parts))
    for row, part in zip(values, parts, strict=True):
        row[:] = part
    return Features(values.T, chosen, False, own)


def write_features(table: Any, features: Features, values: Array, names: Sequence[str], beside: bool = False) -> Any:
    """The table with ``values`` in columns of these names: in the place of the features, or ``beside`` them at the end.

    Raises InputError where a name is that of another column.
    """
    import pyarrow as pa

    if len(names) != (1 if features.tensor else values.shape[1]):
        expected = 1 if features.tensor else values.shape[1]
        raise InputError(f"expected {expected} output columns, got {len(names)}: {_listed(names)}")
    others = [name for name in table.column_names if beside or name not in features.columns]
    taken = [name for name in names if name in others]
    if taken:
        raise InputError(f"a column {taken[0]!r} is there already: rename it, or name the results otherwise")
    written: dict[str, Any] = {}
    if features.tensor:
        from ray.data.extensions import ArrowTensorArray

        written[names[0]] = ArrowTensorArray.from_numpy(np.ascontiguousarray(values))
    else:
        written = {name: pa.array(np.ascontiguousarray(values[:, i])) for i, name in enumerate(names)}
    arranged: dict[str, Any] = {}
    for name in table.column_names:
        if beside or name not in features.columns:
            arranged[name] = table.column(name)
        elif name in written:  # where it was
            arranged[name] = written.pop(name)
        else:  # new names stand where the features stood
            arranged |= {new: written.pop(new) for new in list(written) if new not in table.column_names}
    return pa.table(arranged | written)


def _holds_arrays(kind: Any) -> bool:
    import pyarrow as pa

    return isinstance(kind, pa.BaseExtensionType) or pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _arrays(table: Any, name: str) -> Array:
    """The arrays of a column as one of (n, *)."""
    from ray.data.block import BlockAccessor

    values: Any = BlockAccessor.for_block(table.select([name])).to_numpy(name)
    if values.dtype == object:
        shapes = {np.shape(value) for value in values}
        if len(shapes) > 1:
            some = " and ".join(map(str, sorted(shapes, key=str)[:2]))
            raise ShapeError(f"expected arrays of one shape in column {name!r}, got {some}: pad or cut them")
        values = np.stack([np.asarray(value) for value in values])
    if values.dtype.kind not in "fiub":
        raise InputError(f"expected arrays of numbers in column {name!r}, got {values.dtype}")
    return np.asarray(values)


def _flat(column: Any, name: str) -> Array:
    """A column of numbers as (n,); floats where values are missing."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        column = column.cast(pa.uint8() if pa.types.is_boolean(kind) else pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InputError(
            f"expected numbers in column {name!r}, got {kind}: encode it, drop it, or choose others with columns=[...]"
        )
    array: Array = column.to_numpy()
    return array


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "") if names else "none"
