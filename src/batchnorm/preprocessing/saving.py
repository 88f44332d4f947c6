"""Estimators as files: tensors in safetensors, the rest as JSON in its header, a digest over both; never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from batchnorm._errors import BatchnormError, InputError, OutputError, StatisticsFileError
from batchnorm.preprocessing.base import Normalizer

# The classes of `batchnorm.preprocessing` that can be saved and loaded, by name.
SAVED_CLASSES = ("CORAL", "MeanSubtractor", "MinMaxScaler", "StandardScaler", "Whitener")

_FORMAT = "batchnorm.preprocessing"
_VERSION = 1
_REMEDY = "write it again with save()"


def save(estimator: Normalizer, path: str | PathLike[str]) -> None:
    """Write a fitted estimator beside ``path`` and rename it when whole. Raises OutputError, one line."""
    write_whole(path, to_bytes(estimator), "the statistics")


def load(path: str | PathLike[str]) -> Any:
    """The estimator that ``save`` wrote to ``path``: fitted, and able to go on with ``partial_fit`` and ``merge``.

    Raises StatisticsFileError where the file is missing, truncated, damaged, foreign or of a newer version.
    """
    source = Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StatisticsFileError(
            f"cannot read the statistics file {str(source)!r}: {error.strerror or error}"
        ) from error
    return from_bytes(data, repr(str(source)))


def to_bytes(estimator: Normalizer) -> bytes:
    """A fitted estimator as the contents of a safetensors file. Raises InputError for a class of another package."""
    from batchnorm import preprocessing

    kind = type(estimator).__name__
    if kind not in SAVED_CLASSES or type(estimator) is not getattr(preprocessing, kind):
        raise InputError(
            f"cannot save a {kind} of {type(estimator).__module__}: expected one of {sorted(SAVED_CLASSES)}"
        )
    # A view would be written with all of the memory behind it, or not at all.
    state = {**estimator._stats.to_dict(), **estimator._extra_state()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    names = getattr(estimator, "feature_names_in_", None)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "estimator": kind,
        "parameters": {name: _plain(value) for name, value in estimator.get_params(deep=False).items()},
        "features": estimator.n_features_in_,
        "feature_names": None if names is None else [str(name) for name in names],
    }
    text = json.dumps(header, sort_keys=True)
    return safetensors.torch.save(tensors, {_FORMAT: text, "sha256": _digest(text, tensors)})


def digest(estimator: Normalizer) -> str:
    """A number that tells what was learned, and with which parameters, from anything else."""
    return _metadata(to_bytes(estimator))["sha256"]


def from_bytes(data: bytes, label: str) -> Any:
    """The estimator of :func:`to_bytes`. ``label`` names the source in messages. Raises StatisticsFileError."""
    from batchnorm import preprocessing

    try:
        tensors = safetensors.torch.load(data)
        metadata = _metadata(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StatisticsFileError(
            f"{label} is truncated, damaged or no safetensors file ({_line(error)}): {_REMEDY}"
        ) from error
    if _FORMAT not in metadata:
        raise StatisticsFileError(f"{label} holds no statistics of batchnorm.preprocessing: {_REMEDY}")
    text = metadata[_FORMAT]
    if metadata.get("sha256") != _digest(text, tensors):
        raise StatisticsFileError(f"{label} is damaged, its contents do not match their digest: {_REMEDY}")
    try:
        header = json.loads(text)
        version, kind = header["version"], header["estimator"]
    except (KeyError, TypeError, ValueError) as error:
        raise StatisticsFileError(f"{label} does not describe a fitted estimator: {_line(error)}") from error
    if version != _VERSION:
        raise StatisticsFileError(
            f"{label} is of version {version} of the format, this package reads {_VERSION}: "
            "use the batchnorm that wrote it, or a newer one"
        )
    if kind not in SAVED_CLASSES:
        raise StatisticsFileError(f"{label} holds a {kind!r}, expected one of {sorted(SAVED_CLASSES)}")
    try:
        parameters = {n: tuple(v) if isinstance(v, list) else v for n, v in header["parameters"].items()}
        estimator: Normalizer = getattr(preprocessing, kind)(**parameters)
        estimator.n_features_in_ = int(header["features"])
        names = header["feature_names"]
        if names is not None:
            estimator.feature_names_in_ = np.asarray(names, dtype=object)
        estimator._check_parameters()
        estimator._read_state(tensors)
        if estimator._stats.num_features != header["features"] or (names and len(names) != header["features"]):
            raise InputError(f"its statistics are not those of {header['features']} features")
    except (AttributeError, BatchnormError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StatisticsFileError(f"{label} does not describe a fitted estimator: {_line(error)}") from error
    return estimator


def write_whole(path: str | PathLike[str], data: bytes | memoryview, what: str) -> None:
    """Write ``data`` beside ``path`` and rename it when whole, so that no reader meets half a file.

    Raises OutputError, in which ``what`` names the data; an older file at ``path`` then stays as it was.
    """
    target = Path(path)
    if not target.name:
        raise OutputError(f"cannot write {what} to {str(path)!r}: it names no file")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"cannot write {what} to {str(target)!r}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A parameter without NumPy's types, which JSON does not know."""
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _metadata(data: bytes) -> dict[str, str]:
    """The header's metadata; ``safetensors.torch.load`` has checked the header by then."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header and of every tensor; safetensors itself notices a short file, but not a changed byte."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
