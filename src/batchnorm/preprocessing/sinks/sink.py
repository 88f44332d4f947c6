"""What a sink is: a file in the making, that can be left and gone on with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

State = dict[str, Any]


class Sink:
    """Writes blocks of rows, one after the other, into files of ``scratch``; ``close`` makes ``path`` of them.

    ``rows``: how many were written. A :meth:`checkpoint` says in plain JSON what is safe on the disk; after a crash
    :meth:`restore` makes another sink what that one was. ``interval``: seconds between checkpoints, such that they cost
    next to nothing beside the writing.
    """

    interval = 5.0

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        self.scratch = scratch
        self.rows = 0
        self._busy = False

    def write(self, block: Any) -> None:
        """Add a block: an array, or a ``pyarrow.Table`` where the file has columns."""
        # An interrupt may come between a block and its count: then there is no checkpoint until the next whole block.
        self._busy = True
        self._write(block)
        self.rows += len(block)
        self._busy = False

    def checkpoint(self) -> State | None:
        """Bring all that was written to the disk, and say where that is; None in the middle of a block."""
        return None if self._busy else {"rows": self.rows, **self._flush()}

    def restore(self, state: State) -> bool:
        """Go on where ``state`` was taken; False where the files of then are gone, and the sink begins anew."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the file and put it in its place."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of open files, after an error."""

    def _write(self, block: Any) -> None:
        raise NotImplementedError

    def _flush(self) -> State:
        raise NotImplementedError


class AppendingSink(Sink):
    """Base of the formats whose bytes only grow."""

    _file: BinaryIO | None = None

    @property
    def partial(self) -> Path:
        """Where the bytes go until the file is whole."""
        return self.scratch / "growing"

    def restore(self, state: State) -> bool:
        try:
            if self.partial.stat().st_size < state["bytes"]:
                return False
        except FileNotFoundError:
            return False
        self._file = open(self.partial, "r+b")  # noqa: SIM115 -- close and release close it
        self._file.truncate(state["bytes"])
        self._file.seek(state["bytes"])
        self.rows = state["rows"]
        return True

    def close(self) -> None:
        file = self._open()
        self._finish(file)
        sync(file)
        file.close()
        self._file = None
        self._place()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = open(self.partial, "wb")  # noqa: SIM115 -- close and release close it
        return self._file

    def _flush(self) -> State:
        file = self._open()
        sync(file)
        return {"bytes": file.tell()}

    def _finish(self, file: BinaryIO) -> None:
        """What the end of the file needs, or only now is known of its beginning."""

    def _place(self) -> None:
        os.replace(self.partial, self.path)


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())
