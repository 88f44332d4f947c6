"""What all sources of files share: one file after the other, and errors that name it."""

from __future__ import annotations

import importlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType

from batchnorm._errors import BatchnormError, InputError, MissingDependencyError
from batchnorm.preprocessing.sources.columns import Choice
from batchnorm.preprocessing.sources.paths import total_size
from batchnorm.preprocessing.sources.source import Part, Source

# Beyond this many files their heads are not read just to know how many rows there are.
_COUNTED_FILES = 256


class FileSource(Source):
    """Files of one kind. A subclass reads one of them (``read``) and knows its number of rows (``count``)."""

    kind = "data"
    ahead = 1

    def __init__(self, label: str, files: list[str], choice: Choice) -> None:
        self.label = label
        self.files = files
        self.choice = choice
        self.size = total_size(files)

    @cached_property
    def rows(self) -> int | None:  # type: ignore[override]
        """Of all files, where their heads say it."""
        if len(self.files) > _COUNTED_FILES:
            return None
        total = 0
        for file in self.files:
            with reading(file, self.kind):
                count = self.count(file)
            if count is None:
                return None
            total += count
        return total

    def parts(self) -> Iterator[Part]:
        """The parts of every file, in order."""
        before = 0
        for file in self.files:
            with reading(file, self.kind):
                self.read_bytes = before
                yield from self.read(file)
            before += os.path.getsize(file)
        self.read_bytes = before

    def count(self, file: str) -> int | None:  # noqa: ARG002 -- a subclass reads it
        """The number of rows of a file, None where only reading it would tell."""
        return None

    def read(self, file: str) -> Iterator[Part]:
        """The parts of a file."""
        raise NotImplementedError


@contextmanager
def reading(file: str, kind: str) -> Iterator[None]:
    """Turn whatever a library says of a bad file into one line that names it."""
    try:
        if os.path.exists(file) and os.path.getsize(file) == 0:
            raise InputError(f"{file}: the file is empty (0 bytes)")
        yield
    except (BatchnormError, MemoryError):
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    ) as error:
        lines = str(error.strerror if isinstance(error, OSError) and error.strerror else error).splitlines()
        reason = lines[0].rstrip(". ") if lines else type(error).__name__
        raise InputError(f"{file}: cannot be read as {kind}: {reason}") from error


def need(module: str) -> ModuleType:
    """An optional library that reads files."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise MissingDependencyError(f"reading such files needs {package}: pip install 'batchnorm[files]'") from error
