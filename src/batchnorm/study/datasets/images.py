"""What every set of images is read into, and what every file of one is read by. No torch."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]
_GZIP = b"\x1f\x8b"
# More than any published file holds; a gzip stream can claim to be anything.
_MOST_BYTES = 1 << 30


class MissingFilesError(InputError):
    """Files of a set are not in its folder."""


@dataclass(frozen=True)
class Images:
    """A set of images: ``(n, channels, height, width)`` pixels of 0 to 255 and ``(n,)`` labels of 0 to 9.

    ``unpublished`` names the files whose content is not the published one.
    """

    train: tuple[Bytes, Labels]
    test: tuple[Bytes, Labels]
    unpublished: tuple[str, ...] = ()


def content(path: Path) -> bytes:
    """The bytes of a file, unpacked where it is gzip (whatever its name says).

    Raises:
        InputError: it cannot be read, or its gzip stream is damaged or breaks off.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not raw.startswith(_GZIP):
        return raw
    try:
        with gzip.open(path) as file:
            unpacked = file.read(_MOST_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is a damaged or cut gzip file ({error}): fetch it again") from error
    if len(unpacked) > _MOST_BYTES:
        raise InputError(f"{path} unpacks to more than {_MOST_BYTES} bytes: expected a file of a set of images")
    return unpacked


def sha256(data: bytes) -> str:
    """The checksum by which a published file is known."""
    return hashlib.sha256(data).hexdigest()


def checked_labels(labels: Bytes, source: str) -> Labels:
    """Labels as int64.

    Raises:
        InputError: one is not in 0 to 9, or there are none.
    """
    if labels.size == 0:
        raise InputError(f"{source} holds no images: expected at least one")
    if labels.max() > 9:
        raise InputError(f"{source}: expected labels of 0 to 9, got {labels.max()}: is it another set's file?")
    return labels.astype(np.int64)
