"""What estimators read and give back: NumPy, torch, pandas and polars in, the same kind out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn import get_config
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.moments import as_tensor

# The float64 copy of one block of rows stays in a core's second-level cache.
_BLOCK_ELEMENTS = 2**17


@dataclass(frozen=True)
class Batch:
    """Data as a tensor that shares memory with what the caller passed (``source``), and where its channels are."""

    values: Tensor
    source: Any
    axis: int
    writable: bool
    first_row: int = 0  # of a part of a stream, for messages

    @property
    def num_channels(self) -> int:
        """The number of features."""
        return self.values.shape[self.axis]

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of results: that of floating data, else float64 as NumPy has it or torch's default."""
        if self.values.is_floating_point():
            return self.values.dtype
        return torch.get_default_dtype() if isinstance(self.source, Tensor) else torch.float64

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of samples, small enough for a float64 copy."""
        rows = self.values.shape[0]
        step = max(1, _BLOCK_ELEMENTS * rows // max(1, self.values.numel()))
        for start in range(0, rows, step):
            block = slice(start, min(start + step, rows))
            yield block, self.values[block]

    def along_channels(self, statistic: Tensor) -> Tensor:
        """A statistic (C,) in float64 on the data's device, in a shape that broadcasts over the data."""
        shape = [1] * self.values.ndim
        shape[self.axis] = -1
        return statistic.to(self.values.device, torch.float64).view(shape)


def read(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    check_names: bool = True,
    num_features: int | None = None,
    first_row: int = 0,
) -> Batch:
    """Validate ``X`` as scikit-learn does, in its words, and learn (``reset``) or check names and width.

    ``check_names=False`` and ``num_features`` are for the inverse, whose input has the width of the output.
    """
    channel_axis = estimator.channel_axis
    if isinstance(X, Tensor):
        array = _check_tensor(X, channel_axis)
        if check_names:
            validate_data(estimator, X, reset=reset, skip_check_array=True, ensure_2d=False)
    else:
        array = _check_array(estimator, X, reset, check_names, channel_axis)
    values = as_tensor(array).detach()
    axis = 1 if channel_axis is None else _channel_axis(channel_axis, values.ndim)
    width = values.shape[axis]
    if reset:
        estimator.n_features_in_ = width
    else:
        expected = estimator.n_features_in_ if num_features is None else num_features
        if width != expected:
            raise ShapeError(
                f"X has {width} features, but {type(estimator).__name__} is expecting {expected} features as input"
            )
    writable = bool(array.flags.writeable) if isinstance(array, np.ndarray) else not X.requires_grad
    return Batch(values, X, axis, writable, first_row)


def _check_tensor(X: Tensor, channel_axis: int | None) -> Tensor:
    if X.layout != torch.strided:
        raise DtypeError(f"Sparse data was passed (a tensor of {X.layout}), but dense data is required: X.to_dense()")
    if channel_axis is None and X.ndim != 2:
        raise ShapeError(_not_2d(X.ndim))
    if X.ndim < 2:
        raise ShapeError(f"X must be at least 2-D (samples, channels, ...), got {X.ndim}-D")
    if X.shape[0] == 0:
        raise ShapeError(f"Found array with 0 sample(s) (shape={tuple(X.shape)}) while a minimum of 1 is required.")
    if X.numel() == 0:
        raise ShapeError(f"Found array with 0 feature(s) (shape={tuple(X.shape)}) while a minimum of 1 is required.")
    return X


def _check_array(estimator: Any, X: Any, reset: bool, check_names: bool, channel_axis: int | None) -> Any:
    flat = channel_axis is None
    if flat and getattr(X, "ndim", 2) != 2:
        raise ShapeError(_not_2d(X.ndim))
    options = {"dtype": "numeric", "ensure_all_finite": False, "ensure_2d": flat, "allow_nd": not flat}
    try:
        array = validate_data(estimator, X, reset=reset, **options) if check_names else check_array(X, **options)
        if array.dtype == object:  # nested lists with None, which means missing
            array = array.astype(np.float64)
    except TypeError as error:
        raise DtypeError(str(error)) from error
    except ValueError as error:
        text = str(error)
        if text.startswith("Expected 2D array"):
            raise ShapeError(_not_2d(np.ndim(X))) from error
        if "bytes/strings" in text or "could not convert string" in text:
            found = text.partition("float: ")[2]
            where = f"X ({found})" if found else "X"
            raise InputError(
                f"expected numbers, got text in {where}: encode or drop the columns that hold it"
            ) from error
        # One line, but for the list of feature names, which scikit-learn's own checks compare with its line breaks.
        text = text if text.startswith("The feature names") else text.partition("\n")[0]
        shape = any(word in text for word in ("sample(s)", "feature(s)", "features, but", "inhomogeneous"))
        raise (ShapeError if shape else InputError)(text) from error
    if array.ndim < 2:
        raise ShapeError(f"X must be at least 2-D (samples, channels, ...), got {array.ndim}-D")
    return array


def _not_2d(ndim: int) -> str:
    return (
        f"Expected 2D array, got {ndim}D array instead. Reshape your data: X.reshape(-1, 1) if it is a single feature, "
        "X.reshape(1, -1) if a single sample, or pass channel_axis=1 for data of shape (N, C, *)"
    )


def _channel_axis(channel_axis: int, ndim: int) -> int:
    axis = channel_axis + ndim if channel_axis < 0 else channel_axis
    if not 0 < axis < ndim:
        raise ShapeError(
            f"channel_axis={channel_axis} is not an axis of {ndim}-D data after the samples: use 1 to {ndim - 1}"
        )
    return axis


def check_names(estimator: Any, names: Sequence[str], *, reset: bool) -> None:
    """Learn (``reset``) the names of the features, or compare them with those that were learned."""
    if reset:
        estimator.feature_names_in_ = np.asarray(names, dtype=object)
        return
    learned = getattr(estimator, "feature_names_in_", None)
    if learned is None or list(learned) == list(names):
        return
    missing, found = next((a, b) for a, b in zip(learned, names, strict=True) if a != b)
    raise InputError(
        f"the features must have the names and the order that were learned: expected {str(missing)!r}, got {found!r}"
    )


def read_weights(sample_weight: Any, batch: Batch, *, zeros: bool = False) -> Tensor | None:
    """``sample_weight`` as float64 of shape (N,): finite, not negative, and unless ``zeros`` not all zero."""
    if sample_weight is None:
        return None
    rows = batch.values.shape[0]
    if isinstance(sample_weight, Tensor):
        weights = as_tensor(sample_weight).detach().to(torch.float64)
    elif isinstance(sample_weight, Real):
        weights = torch.full((rows,), float(sample_weight), dtype=torch.float64)
    else:
        try:
            array = check_array(
                sample_weight, ensure_2d=False, allow_nd=True, dtype=np.float64, ensure_all_finite=False
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"sample_weight must be numbers: {str(error).splitlines()[0]}") from error
        weights = as_tensor(array)
    if weights.shape != (rows,):
        raise ShapeError(f"sample_weight must have shape ({rows},), one weight a sample, got {tuple(weights.shape)}")
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InputError(
            f"sample_weight must be finite and not negative, got {float(weights[row])} for row {batch.first_row + row}"
        )
    if not zeros and not bool((weights > 0).any()):
        raise InputError("sample weights must contain at least one non-zero number: all are zero")
    return weights.to(batch.values.device)


def refuse_infinite(estimator: Any, batch: Batch) -> None:
    """Raise an InputError that names the row and the column of the first infinite value, if there is one."""
    if not batch.values.is_floating_point() or bool(torch.isfinite(batch.values.sum())):
        return
    for block, values in batch.row_blocks():
        infinite = torch.isinf(values)
        if bool(infinite.any()):
            index = [int(i) for i in infinite.nonzero()[0]]
            row, column = batch.first_row + index[0] + block.start, index[batch.axis]
            names = getattr(batch.source, "columns", getattr(estimator, "feature_names_in_", None))
            label = f" ({str(names[column])!r})" if names is not None and column < len(names) else ""
            where = f"row {row}, column {column}{label}"
            raise InputError(f"Input X contains infinity: {where}; remove the row, or write NaN for a missing value")


def _same_memory(source: Any, out: Tensor) -> bool:
    """Whether the result was written into the caller's own array."""
    if isinstance(source, Tensor):
        return source.data_ptr() == out.data_ptr()
    return isinstance(source, np.ndarray) and source.ctypes.data == out.data_ptr()


def give_back(estimator: Any, batch: Batch, out: Tensor, columns: Sequence[str] | None = None) -> Any:
    """``out`` as the kind of container that came in; an explicit ``set_output`` decides over that.

    ``columns``: names of the columns of a data frame, None for those it came with.
    """
    configured = getattr(estimator, "_sklearn_output_config", {}).get("transform")
    if configured is None and get_config()["transform_output"] != "default":
        configured = get_config()["transform_output"]
    frame = configured not in (None, "default")
    if frame and out.ndim != 2:
        raise ShapeError(
            f"set_output(transform={configured!r}) needs 2-D results, got shape {tuple(out.shape)}: "
            'use set_output(transform="default")'
        )
    if not frame and _same_memory(batch.source, out):
        return batch.source
    if isinstance(batch.source, Tensor):
        if not frame:
            return out
        return (out.float() if out.dtype == torch.bfloat16 else out).cpu().numpy()
    array = out.numpy()
    library = type(batch.source).__module__.partition(".")[0]
    if configured is not None or library not in ("pandas", "polars"):
        return array
    names = batch.source.columns if columns is None else list(columns)
    if library == "pandas":
        return type(batch.source)(array, index=batch.source.index, columns=names, copy=False)
    return type(batch.source)(array, schema=list(names), orient="row")
