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

_FORMAT = "batchnorm.preprocessing"
_VERSION = 1
_REMEDY = "write it again with save()"


def save(estimator: Normalizer, path: str | PathLike[str]) -> None:
    """Write a fitted estimator beside ``path`` and rename it when whole. Raises OutputError, one line."""
    target = Path(path)
    # A view would be written with all of the memory behind it, or not at all.
    state = {**estimator._stats.to_dict(), **estimator._extra_state()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    names = getattr(estimator, "feature_names_in_", None)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "estimator": type(estimator).__name__,
        "parameters": {name: _plain(value) for name, value in estimator.get_params(deep=False).items()},
        "features": estimator.n_features_in_,
        "feature_names": None if names is None else [str(name) for name in names],
    }
    text = json.dumps(header, sort_keys=True)
    data = safetensors.torch.save(tensors, {_FORMAT: text, "sha256": _digest(text, tensors)})
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(f"cannot write the statistics to {str(target)!r}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | PathLike[str]) -> Any:
    """The estimator that ``save`` wrote to ``path``: fitted, and able to go on with ``partial_fit`` and ``merge``.

    Raises StatisticsFileError where the file is missing, truncated, damaged, foreign or of a newer version.
    """
    from batchnorm import preprocessing

    source = Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StatisticsFileError(
            f"cannot read the statistics file {str(source)!r}: {error.strerror or error}"
        ) from error
    try:
        tensors = safetensors.torch.load(data)
        metadata = _metadata(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StatisticsFileError(
            f"{str(source)!r} is truncated, damaged or no safetensors file ({_line(error)}): {_REMEDY}"
        ) from error
    if _FORMAT not in metadata:
        raise StatisticsFileError(f"{str(source)!r} holds no statistics of batchnorm.preprocessing: {_REMEDY}")
    text = metadata[_FORMAT]
    if metadata.get("sha256") != _digest(text, tensors):
        raise StatisticsFileError(f"{str(source)!r} is damaged, its contents do not match their digest: {_REMEDY}")
    header = json.loads(text)
    if header.get("version") != _VERSION:
        raise StatisticsFileError(
            f"{str(source)!r} is of version {header.get('version')} of the format, this package reads {_VERSION}: "
            "use the batchnorm that wrote it, or a newer one"
        )
    kinds = {"MeanSubtractor", "StandardScaler", "MinMaxScaler", "Whitener"}
    if header["estimator"] not in kinds:
        raise StatisticsFileError(f"{str(source)!r} holds a {header['estimator']!r}, expected one of {sorted(kinds)}")
    try:
        parameters = {n: tuple(v) if isinstance(v, list) else v for n, v in header["parameters"].items()}
        estimator: Normalizer = getattr(preprocessing, header["estimator"])(**parameters)
        estimator.n_features_in_ = int(header["features"])
        if header["feature_names"] is not None:
            estimator.feature_names_in_ = np.asarray(header["feature_names"], dtype=object)
        estimator._check_parameters()
        estimator._read_state(tensors)
        names = header["feature_names"]
        if estimator._stats.num_features != header["features"] or (names and len(names) != header["features"]):
            raise InputError(f"its statistics are not those of {header['features']} features")
    except (BatchnormError, KeyError, TypeError, ValueError) as error:
        raise StatisticsFileError(f"{str(source)!r} does not describe a fitted estimator: {_line(error)}") from error
    return estimator


def _plain(value: Any) -> Any:
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
