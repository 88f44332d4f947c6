"""The records of a study: JSON lines, appended run by run, from which everything else can be rebuilt.

A line is an object with at least ``section``, ``variant``, ``seed``, ``step``, ``metric``, ``value`` and ``run``. The
lines of one run are appended together when it is finished, and end with a completion record (metric ``finished``): a
study killed at any point leaves whole runs, and at most one torn tail that :func:`repair` cuts away.

The only values that may differ between two runs with the same seed on the same machine are those of metric ``seconds``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm._errors import OutputError, RecordsError

Record = dict[str, Any]
FINISHED = "finished"
_REQUIRED = ("section", "variant", "seed", "step", "metric", "value", "run")


@dataclass(frozen=True)
class Records:
    """The records of finished runs, in the file's order; ``dropped`` says what else was there, else empty."""

    lines: tuple[Record, ...]
    dropped: str = ""

    def __iter__(self) -> Iterator[Record]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, **wanted: Any) -> Records:
        """The lines whose fields equal ``wanted``; a field that a line has not is None."""
        keep = tuple(line for line in self.lines if all(line.get(key) == want for key, want in wanted.items()))
        return Records(keep)

    def finished(self) -> frozenset[str]:
        """The ids of the finished runs."""
        return frozenset(line["run"] for line in self.lines if line["metric"] == FINISHED)

    def curve(self, metric: str) -> tuple[tuple[int, float], ...]:
        """(step, value) of ``metric``, by step. Meant for the records of one run."""
        return tuple(sorted((line["step"], line["value"]) for line in self.lines if line["metric"] == metric))

    def value(self, metric: str, default: Any = None) -> Any:
        """The last value of ``metric``, or ``default``."""
        values = [line["value"] for line in self.lines if line["metric"] == metric]
        return values[-1] if values else default

    def distinct(self, key: str) -> tuple[Any, ...]:
        """The values that field ``key`` takes, in order of appearance."""
        return tuple(dict.fromkeys(line[key] for line in self.lines if key in line))


def read(path: Path) -> Records:
    """Read the records of finished runs; the file is left as it is.

    A tail that was cut in the middle of a line and lines of runs that were never finished are left out, and named in
    ``dropped``.

    Raises:
        RecordsError: no such file, or a line before the last is not a record (the message gives its number).
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RecordsError(f"cannot read the records {path}: {error.strerror or error}") from error
    lines, torn = _parse(text, path)
    done = {line["run"] for line in lines if line["metric"] == FINISHED}
    kept = tuple(line for line in lines if line["run"] in done)
    parts = ["a line cut in the middle"] if torn else []
    unfinished = dict.fromkeys(line["run"] for line in lines if line["run"] not in done)
    if unfinished:
        parts.append(f"{len(lines) - len(kept)} records of the unfinished run {', '.join(unfinished)}")
    return Records(kept, f"dropped {' and '.join(parts)}" if parts else "")


def append(path: Path, block: Sequence[Record]) -> None:
    """Append the records of one finished run, whole, and see them safely to the disk.

    Raises:
        OutputError: the file cannot be written.
    """
    data = _encode(block)
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except BaseException:
                # A full disk, or an interrupt between two writes: no torn line may be left for another to be put after.
                file.truncate(before)
                raise
    except OSError as error:
        raise OutputError(f"cannot write the records {path}: {error.strerror or error}") from error


def repair(path: Path) -> Records:
    """Read the records, and where something has to be dropped, write the file anew without it.

    Raises:
        RecordsError: as :func:`read`.
        OutputError: the file cannot be written.
    """
    records = read(path)
    ends_whole = path.read_bytes()[-1:] in (b"\n", b"")
    if records.dropped or not ends_whole:
        rewrite(path, records)
    return records


def rewrite(path: Path, lines: Iterable[Record]) -> None:
    """Replace the file by ``lines``: written beside it, then renamed over it."""
    write_whole(path, _encode(lines))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its target and rename it over it, so that a reader never sees half of it.

    Raises:
        OutputError: the folder cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _encode(lines: Iterable[Record]) -> bytes:
    # allow_nan=False: JSON has no NaN; a diverged loss is written as None by whoever measured it.
    return b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)


def _parse(text: bytes, path: Path) -> tuple[list[Record], bool]:
    rows = text.split(b"\n")
    whole_end = rows[-1] == b""
    if whole_end:
        rows.pop()
    lines: list[Record] = []
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict) or any(key not in line for key in _REQUIRED):
                raise ValueError("not a record with " + ", ".join(_REQUIRED))
        except ValueError as error:
            # Only a last line without its newline can come from an interrupted write; anything else is damage.
            if number == len(rows) and not whole_end:
                return lines, True
            raise RecordsError(
                f"{path}, line {number}: expected a record as JSON, got {row[:40]!r} ({error}): "
                "restore the file, or delete that line's run and resume"
            ) from error
        lines.append(line)
    return lines, False
