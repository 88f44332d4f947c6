"""MNIST: four IDX files, plain or gzip.

IDX: two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of dimensions, then each dimension
as a big-endian 32-bit integer, then the values, the last dimension fastest. Read as ``magic = 2048 + dimensions``.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from batchnorm._errors import InputError
from batchnorm.study.datasets.fetching import Source, fetch
from batchnorm.study.datasets.images import Bytes, Images, Labels, MissingFilesError, checked_labels, content, sha256

TITLE = "MNIST"
SIDE = 28
# SHA-256 of each file unpacked: a file that was packed anew, or never, is told by it as well.
PUBLISHED = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# The same, packed, as they are fetched: (SHA-256, bytes).
PACKED = {
    "train-images-idx3-ubyte": ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9912422),
    "train-labels-idx1-ubyte": ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28881),
    "t10k-images-idx3-ubyte": ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1648877),
    "t10k-labels-idx1-ubyte": ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4542),
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
# Where other programs leave them, below the folder.
_PLACES = ("", "MNIST/raw", "mnist")


def read(folder: Path) -> Images:
    """Read MNIST from ``folder``: files as published, with or without ``.gz``, or with a dot before "idx".

    Raises:
        MissingFilesError: a file is not there.
        InputError: a file is damaged, or not of MNIST's format.
    """
    parts, unpublished = {}, []
    missing = [name for name in PUBLISHED if _find(folder, name) is None]
    if missing:
        raise MissingFilesError(
            f"{folder} lacks {', '.join(missing)}: expected MNIST's four IDX files, plain or .gz; put them there or "
            "use --download"
        )
    for name, checksum in PUBLISHED.items():
        path = _find(folder, name)
        assert path is not None
        data = content(path)
        parts[name] = idx(data, path, dimensions=3 if "images" in name else 1)
        if sha256(data) != checksum:
            unpublished.append(path.name)
    train, test = (_part(folder, parts[f"{part}-images-idx3-ubyte"], parts[f"{part}-labels-idx1-ubyte"], part)
                   for part in ("train", "t10k"))  # fmt: skip
    return Images(train, test, tuple(unpublished))


@functools.lru_cache(maxsize=1)
def load(folder: str) -> Images:
    """Read MNIST, and keep it for the next run in this process."""
    return read(Path(folder))


def download(folder: Path, tell: Callable[[str], None]) -> None:
    """Fetch the files that ``folder`` lacks, gzip as they are published.

    Raises:
        InputError: none of the mirrors gives the published file.
        OutputError: the folder cannot be written.
    """
    for name, (checksum, size) in PACKED.items():
        if _find(folder, name) is None:
            urls = tuple(f"{mirror}{name}.gz" for mirror in MIRRORS)
            fetch(Source(f"{name}.gz", urls, checksum, size), folder, tell)


def idx(data: bytes, path: Path, dimensions: int) -> Bytes:
    """The array of an IDX file of unsigned bytes with so many dimensions.

    Raises:
        InputError: another magic number, or more or fewer bytes than the header promises.
    """
    wanted = 2048 + dimensions
    head = 4 * (1 + dimensions)
    if len(data) < head:
        raise InputError(
            f"{path} is cut short: expected an IDX header of {head} bytes, got {len(data)}: fetch it again"
        )
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:head])
    if magic != wanted:
        raise InputError(
            f"{path}: expected the IDX magic number {wanted} (unsigned bytes, {dimensions}-dimensional), got {magic}: "
            "it is another file"
        )
    promised, held = math.prod(shape), len(data) - head
    if promised != held:
        size = " x ".join(str(length) for length in shape)
        raise InputError(f"{path}: its header promises {size} = {promised} bytes, it holds {held}: fetch it again")
    # A copy of its own: torch has no tensors that may not be written to.
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape).copy()


def _part(folder: Path, images: Bytes, labels: Bytes, part: str) -> tuple[Bytes, Labels]:
    if images.shape[1:] != (SIDE, SIDE):
        height, width = images.shape[1:]
        raise InputError(f"{folder}: expected {part} images of {SIDE} x {SIDE} pixels, got {height} x {width}")
    if len(images) != len(labels):
        raise InputError(
            f"{folder}: {len(images)} {part} images and {len(labels)} {part} labels do not belong together: fetch both"
        )
    return images[:, None], checked_labels(labels, f"{folder}, {part} labels")


def _find(folder: Path, name: str) -> Path | None:
    for place in _PLACES:
        for form in (name, f"{name}.gz", dotted := name.replace("-idx", ".idx"), f"{dotted}.gz"):
            path = folder / place / form
            if path.is_file():
                return path
    return None
