"""CIFAR-10, binary version: six files of rows of 3073 bytes, in a folder or in the published archive.

A row is a label of 0 to 9 and 3 x 32 x 32 pixels: all of red, all of green, all of blue, each by rows. The Python
version holds the same images pickled, and is refused: to read it is to run the code in it.
"""

from __future__ import annotations

import functools
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from batchnorm._errors import InputError
from batchnorm.study.datasets.fetching import Source, fetch
from batchnorm.study.datasets.images import Bytes, Images, Labels, MissingFilesError, checked_labels, content, sha256

TITLE = "CIFAR-10"
CHANNELS, SIDE = 3, 32
ROW = 1 + CHANNELS * SIDE * SIDE
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
PUBLISHED = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
ARCHIVE = Source(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    170052171,
)
_PLACES = ("", "cifar-10-batches-bin")
_ARCHIVES = (ARCHIVE.name, "cifar-10-binary.tar")
_PICKLED = ("cifar-10-python.tar.gz", "cifar-10-batches-py")
# 10,000 rows are published; a member of an archive that claims more is not one of these files.
_MOST_BYTES = 100_000 * ROW


def read(folder: Path) -> Images:
    """Read CIFAR-10 from ``folder``: its six ``.bin`` files (plain or gzip), or the archive that holds them.

    Raises:
        MissingFilesError: they are not there, or only the pickled version is.
        InputError: a file is damaged, or not of the binary format.
    """
    paths = {name: path for name in PUBLISHED if (path := _find(folder, name))}
    archive = next((folder / name for name in _ARCHIVES if (folder / name).is_file()), None)
    if len(paths) == len(PUBLISHED):
        files = {name: content(path) for name, path in paths.items()}
    elif archive is not None:
        files = _unpacked(archive)
    else:
        raise MissingFilesError(_what_is_missing(folder, [name for name in PUBLISHED if name not in paths]))
    parts = {name: rows(data, f"{folder}: {name}") for name, data in files.items()}
    images, labels = zip(*(parts[name] for name in TRAIN), strict=True)
    unpublished = tuple(name for name in PUBLISHED if sha256(files[name]) != PUBLISHED[name])
    return Images((np.concatenate(images), np.concatenate(labels)), parts[TEST], unpublished)


@functools.lru_cache(maxsize=1)
def load(folder: str) -> Images:
    """Read CIFAR-10, and keep it for the next run in this process."""
    return read(Path(folder))


def download(folder: Path, tell: Callable[[str], None]) -> None:
    """Fetch the archive of the binary version into ``folder``; it stays packed.

    Raises:
        InputError: the published archive cannot be had.
        OutputError: the folder cannot be written.
    """
    fetch(ARCHIVE, folder, tell)


def rows(data: bytes, source: str) -> tuple[Bytes, Labels]:
    """Images ``(n, 3, 32, 32)`` and labels of one file.

    Raises:
        InputError: no whole number of rows, or a label above 9.
    """
    if len(data) % ROW:
        raise InputError(
            f"{source}: expected rows of {ROW} bytes (a label and 3 x 32 x 32 pixels), got {len(data)} bytes, which is "
            "no whole number of them: the file is cut, or is not of the binary version"
        )
    table = np.frombuffer(data, dtype=np.uint8).reshape(-1, ROW)
    return table[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE).copy(), checked_labels(table[:, 0], source)


def _unpacked(archive: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                # Read in memory, by name: nothing is ever written where an archive says.
                if name in PUBLISHED and member.isfile() and member.size <= _MOST_BYTES:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    files[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{archive} is a damaged or cut archive ({error}): fetch it again") from error
    missing = [name for name in PUBLISHED if name not in files]
    if missing:
        raise InputError(f"{archive} lacks {', '.join(missing)}: expected the binary version of CIFAR-10")
    return files


def _what_is_missing(folder: Path, missing: list[str]) -> str:
    pickled = [name for name in _PICKLED if (folder / name).exists()]
    if pickled:
        return (
            f"{folder} holds {pickled[0]}, the Python version of CIFAR-10, which is pickled and is not read, as that "
            f"runs the code in it: put {ARCHIVE.name}, the binary version, there or use --download"
        )
    return (
        f"{folder} lacks {', '.join(missing)}: expected the six files of CIFAR-10's binary version, or {ARCHIVE.name}; "
        "put them there or use --download"
    )


def _find(folder: Path, name: str) -> Path | None:
    for place in _PLACES:
        for form in (name, f"{name}.gz"):
            if (folder / place / form).is_file():
                return folder / place / form
    return None
