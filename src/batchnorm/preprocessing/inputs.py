"""What estimators read and give back: NumPy, SciPy, torch, pandas, polars and pyarrow in, the same kind out."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data
from torch import Tensor

from batchnorm._errors import DtypeError, InputError, ShapeError
from batchnorm.moments import as_tensor
from batchnorm.preprocessing.batch import Batch, NothingToLearnError
from batchnorm.preprocessing.frames import (
    column_names,
    is_frame,
    like_frame,
    named,
    read_frame,
    refuse_other_containers,
)
from batchnorm.preprocessing.output import frames_wanted
from batchnorm.preprocessing.sparse import SparseBatch, is_sparse, read_sparse

__all__ = ["Batch", "check_names", "give_back", "read", "read_weights", "refuse_infinite", "refuse_overflow"]

# Not the floats of 8 bits: torch computes nothing with them.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


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
    if is_sparse(X):
        batch: Batch = read_sparse(estimator, X, reset=reset, check_names=check_names, first_row=first_row)
    else:
        batch = _read_dense(estimator, X, reset, check_names, first_row)
    width = batch.num_channels
    if reset:
        estimator.n_features_in_ = width
    else:
        expected = estimator.n_features_in_ if num_features is None else num_features
        if width != expected:
            raise ShapeError(
                f"X has {width} features, but {type(estimator).__name__} is expecting {expected} features as input"
            )
    return batch


def _read_dense(estimator: Any, X: Any, reset: bool, check_names: bool, first_row: int) -> Batch:
    channel_axis = estimator.channel_axis
    if isinstance(X, Tensor):
        array = _check_tensor(X, channel_axis)
        if check_names:
            validate_data(estimator, X, reset=reset, skip_check_array=True, ensure_2d=False)
    else:
        array = _check_array(estimator, X, reset, check_names, channel_axis)
    values = as_tensor(array).detach()
    axis = 1 if channel_axis is None else _channel_axis(channel_axis, values.ndim)
    writable = bool(array.flags.writeable) if isinstance(array, np.ndarray) else not X.requires_grad
    return Batch(values, X, axis, writable, first_row)


def _check_tensor(X: Tensor, channel_axis: int | None) -> Tensor:
    if X.is_meta:
        raise InputError("X is on the meta device, where tensors hold no values: pass the data themselves")
    if X.dtype not in (*_FLOATS, *_INTEGERS, torch.bool) and not X.is_complex():
        raise DtypeError(f"expected floats of at least 16 bits or integers, got {X.dtype}: pass X.to(torch.float32)")
    if channel_axis is None and X.ndim != 2:
        raise ShapeError(_not_2d(X.ndim))
    if X.ndim < 2:
        raise ShapeError(f"X must be at least 2-D (samples, channels, ...), got {X.ndim}-D")
    if X.shape[0] == 0:
        raise NothingToLearnError(
            f"Found array with 0 sample(s) (shape={tuple(X.shape)}) while a minimum of 1 is required."
        )
    if X.numel() == 0:
        raise ShapeError(f"Found array with 0 feature(s) (shape={tuple(X.shape)}) while a minimum of 1 is required.")
    return X


def _check_array(estimator: Any, X: Any, reset: bool, check_names: bool, channel_axis: int | None) -> Any:
    flat = channel_axis is None
    refuse_other_containers(X)
    if flat and getattr(X, "ndim", 2) != 2:
        raise ShapeError(_not_2d(X.ndim))
    options = {"dtype": "numeric", "ensure_all_finite": False, "ensure_2d": flat, "allow_nd": not flat}
    if isinstance(X, np.ma.MaskedArray):  # what is under the mask is missing
        X = np.ma.filled(X.astype(np.result_type(X.dtype, np.float16)), np.nan)
    try:
        if is_frame(X):
            if check_names:
                validate_data(estimator, named(X), reset=reset, skip_check_array=True, ensure_2d=False)
            array = check_array(read_frame(X), **options)
        else:
            array = validate_data(estimator, X, reset=reset, **options) if check_names else check_array(X, **options)
        if array.dtype == object:  # nested lists with None, which means missing
            array = array.astype(np.float64)
    except TypeError as error:
        raise DtypeError(str(error)) from error
    except InputError:
        raise
    except ValueError as error:
        text = str(error)
        if text.startswith("Expected 2D array"):
            raise ShapeError(_not_2d(np.ndim(X))) from error
        if "bytes/strings" in text or "could not convert string" in text:
            raise InputError(f"expected numbers, got text{_first_text(X)}: encode or drop the column") from error
        if "inhomogeneous" in text:
            raise ShapeError(f"expected rows of one length, {_first_ragged(X)}") from error
        # One line, but for the list of feature names, which scikit-learn's own checks compare with its line breaks.
        text = text if text.startswith("The feature names") else text.partition("\n")[0]
        if "with 0 sample(s)" in text:
            raise NothingToLearnError(text) from error
        shape = any(word in text for word in ("sample(s)", "feature(s)", "features, but"))
        raise (ShapeError if shape else InputError)(text) from error
    if array.ndim < 2:
        raise ShapeError(f"X must be at least 2-D (samples, channels, ...), got {array.ndim}-D")
    return array


def _first_text(X: Any) -> str:
    """Where the first text is that is no number, for the message: `` ('a') in row 0, column 1``."""
    values = np.asarray(X, dtype=object)
    for index, value in np.ndenumerate(values):
        if isinstance(value, (str, bytes)):
            return f" ({value!r}) in row {index[0]}" + (f", column {index[1]}" if len(index) == 2 else "")
    return ""


def _first_ragged(X: Any) -> str:
    """Which row of a nested list is unlike the first one, for the message."""
    lengths = [len(row) if hasattr(row, "__len__") else None for row in X]
    row = next((i for i, length in enumerate(lengths) if length != lengths[0]), None)
    if row is None:
        return "got lists of different lengths within the rows"
    return f"got {lengths[0]} values in row 0 and {lengths[row]} in row {row}"


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
    rows = batch.num_rows
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
        raise NothingToLearnError("sample weights must contain at least one non-zero number: all are zero")
    return weights.to(batch.values.device)


def refuse_infinite(estimator: Any, batch: Batch) -> None:
    """Raise an InputError that names the row and the column of the first infinite value, if there is one."""
    found = batch.first_infinite()
    if found is not None:
        names = column_names(batch.source)
        where = _place(batch, found, getattr(estimator, "feature_names_in_", None) if names is None else names)
        raise InputError(f"Input X contains infinity: {where}; remove the row, or write NaN for a missing value")


def refuse_overflow(batch: Batch, out: Tensor) -> None:
    """Raise an InputError where finite data became infinite in float16."""
    if out.dtype == torch.float16:
        found = batch.first_infinite(out)
        if found is not None:
            where = _place(batch, found, column_names(batch.source) if out.shape == batch.values.shape else None)
            raise InputError(f"the result overflows float16, beyond 65504: {where}; transform the data as float32")


def _place(batch: Batch, found: tuple[int, int], names: Sequence[Any] | None) -> str:
    row, column = batch.first_row + found[0], found[1]
    label = f" ({str(names[column])!r})" if names is not None and column < len(names) else ""
    return f"row {row}, column {column}{label}"


def _same_memory(source: Any, out: Tensor) -> bool:
    """Whether the result was written into the caller's own array."""
    if isinstance(source, Tensor):
        return source.data_ptr() == out.data_ptr()
    return isinstance(source, np.ndarray) and source.ctypes.data == out.data_ptr()


def give_back(estimator: Any, batch: Batch, out: Tensor, columns: Sequence[str] | None = None) -> Any:
    """``out`` as the kind of container that came in; an explicit ``set_output`` decides over that.

    ``columns``: names of the columns of a data frame, None for those it came with.
    """
    configured = frames_wanted(estimator)
    refuse_overflow(batch, out)
    frame = configured is not None
    if isinstance(batch, SparseBatch):
        if frame:
            raise InputError(
                f"set_output(transform={configured!r}) has no frames of sparse data: "
                'use set_output(transform="default"), or pass dense data'
            )
        return batch.with_values(out)
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
    # set_output(transform="default") is scikit-learn's default, an array; unset it is ours.
    unset = not frame and getattr(estimator, "_sklearn_output_config", {}).get("transform") is None
    result = like_frame(batch.source, array, columns) if unset else None
    return array if result is None else result
