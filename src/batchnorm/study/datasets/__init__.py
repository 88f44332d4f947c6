"""Image data that do not ship with scikit-learn: MNIST and CIFAR-10, read from a folder or fetched into it.

Files are the published ones, in the published formats: IDX, and CIFAR-10's binary version. Nothing is unpickled.

Whether a file is whole is an error of its own: a wrong magic number, a size that its header or its format forbids, a
gzip stream that breaks off. Whether it is the *published* file is told by its SHA-256, and is not an error for a file
that the user put there: there are good reasons to try others (Fashion-MNIST has MNIST's names and format), so the study
says it before it starts and on its page. A file that was fetched has to be the published one, or it isn't kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from batchnorm._errors import ConfigError, InputError
from batchnorm.study.datasets.images import Images, MissingFilesError

__all__ = ["Images", "MissingFilesError", "load", "prepare"]


class Reader(Protocol):
    """What each module of a set offers; it is named as the section that asks for it."""

    TITLE: str

    def read(self, folder: Path) -> Images:
        """Read the set from ``folder``."""

    def download(self, folder: Path, tell: Callable[[str], None]) -> None:
        """Fetch what is missing into ``folder``."""

    def load(self, folder: str) -> Images:
        """Read the set, and keep it for the next run in this process."""


def load(name: str, folder: str) -> Images:
    """The set ``name`` ("mnist" or "cifar10") from ``folder``; read once a process.

    Raises:
        InputError: a file is missing or is not what its format says.
    """
    return _reader(name).load(folder)


def prepare(names: Iterable[str], folder: str, download: bool, tell: Callable[[str], None]) -> None:
    """See that the sets ``names`` can be read, before hours are spent; ``tell`` is what the user should know of them.

    Args:
        names: of sets, "mnist" or "cifar10".
        folder: where their files are.
        download: fetch what is missing into ``folder``.
        tell: called with a line of text: what is fetched, and which files are not the published ones.

    Raises:
        ConfigError: no folder was given.
        InputError: a file is missing and ``download`` is false, cannot be fetched, or is not what its format says.
        OutputError: the folder cannot be written.
    """
    for name in names:
        reader = _reader(name)
        if not folder:
            raise ConfigError(
                f"section {name} needs the files of {reader.TITLE}: name their folder with --data-dir FOLDER "
                "(data_dir in a configuration); --download fetches them into it"
            )
        try:
            images = reader.read(Path(folder))
        except MissingFilesError:
            if not download:
                raise
            reader.download(Path(folder), tell)
            images = reader.read(Path(folder))
        if images.unpublished:
            tell(
                f"{', '.join(images.unpublished)} in {folder}: not the published {reader.TITLE} (other SHA-256); "
                "the study goes on with what is there and says so. If it should be the published one, delete the file "
                "and use --download"
            )


def _reader(name: str) -> Reader:
    if name not in ("mnist", "cifar10"):
        raise InputError(f"unknown set of images {name!r}: expected mnist or cifar10")
    module: Reader = importlib.import_module(f"batchnorm.study.datasets.{name}")
    return module
