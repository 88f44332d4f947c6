"""Fetch a published file into a folder: whole and with its checksum, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batchnorm._errors import InputError, OutputError

_SECONDS = 30.0
_CHUNK = 1 << 20
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Source:
    """A published file: its name, where it can be had, its SHA-256 and its size in bytes."""

    name: str
    urls: tuple[str, ...]
    sha256: str
    size: int


def fetch(source: Source, folder: Path, tell: Callable[[str], None]) -> Path:
    """Fetch ``source`` into ``folder`` from the first of its addresses that gives the published file.

    It is written beside its place, checked, and renamed: an interrupted fetch leaves nothing that looks like the file.

    Raises:
        InputError: no address gives it; the message has the last reason.
        OutputError: the folder cannot be written.
    """
    target = folder / source.name
    beside = folder / f".{source.name}.{os.getpid()}.part"
    reason = "no address"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for url in source.urls:
            tell(f"fetching {source.name}, {source.size / _MEGABYTE:.2g} MB, from {url}")
            with beside.open("wb") as file:
                reason = _copy(url, file, source)
            if not reason:
                beside.replace(target)
                return target
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {source.name} into {folder}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # where the folder could not be made
            beside.unlink(missing_ok=True)
    raise InputError(
        f"cannot fetch {source.name} ({reason}): try again with a network, or put the file into {folder} yourself"
    )


def _copy(url: str, file: BinaryIO, source: Source) -> str:
    """Copy an address into ``file``; why it cannot be taken, else empty."""
    digest, held = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            while chunk := answer.read(_CHUNK):
                held += len(chunk)
                if held > source.size:
                    return f"{url} gives more than the published {source.size} bytes"
                digest.update(chunk)
                _write(file, chunk)
    except OutputError:
        raise
    # A URLError is an OSError too; what the network does to a transfer has many names.
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}"
    if held < source.size:
        return f"{url} gives {held} of the published {source.size} bytes"
    if digest.hexdigest() != source.sha256:
        return f"{url} gives a file with another SHA-256 than the published one"
    _write(file, b"")
    return ""


def _write(file: BinaryIO, chunk: bytes) -> None:
    """Write ``chunk``; at the end (empty) see what was written safely to the disk."""
    try:
        file.write(chunk)
        if not chunk:
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot write {file.name}: {error.strerror or error}") from error
