"""Which files a path, a pattern, a folder or a list of them means, and of what kind they are."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from urllib.parse import unquote

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources.columns import listed

KINDS = {
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"), "image"),
}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}

Path = str | PathLike[str]


def kind_of(file: str) -> str | None:
    """The kind of a file by its suffix, None where it has no known one; only text is read compressed."""
    stem, suffix = os.path.splitext(file.lower())
    if suffix in COMPRESSED:
        kind = KINDS.get(os.path.splitext(stem)[1])
        return kind if kind == "csv" else None
    return KINDS.get(suffix)


def find_files(X: Path | Sequence[Path]) -> tuple[str, list[str], str]:
    """A label, the files in the order they are read, and their kind.

    A list keeps its order. What a pattern or a folder finds is sorted by name, numbers in names as numbers. A folder is
    read with its subfolders, less what begins with a dot or an underscore and what is of no known kind.
    """
    given: Sequence[Path] = [X] if isinstance(X, (str, PathLike)) else X
    paths = [os.path.expanduser(os.fspath(path)) for path in given]
    label = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    files: list[str] = []
    for path in paths:
        files += _expand(path)
    kinds: dict[str, str] = {}
    for file in files:
        kind = kind_of(file)
        if kind is None:
            known = sorted({*KINDS, ".csv.gz"})
            raise InputError(f"{file}: cannot tell by its suffix how to read it; known are {' '.join(known)}")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise InputError(f"{label}: holds files of different kinds ({one}, {other}): choose some by a pattern")
    return label, files, next(iter(kinds))


def _expand(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return _folder(path)
    if glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True), key=natural)
        files = [file for entry in found for file in ([entry] if os.path.isfile(entry) else [])]
        # A pattern that only folders match means what is in them: data/year=*
        files = files or [file for entry in found for file in _folder(entry)]
        if not files:
            raise InputError(f"no file matches {path!r}")
        return files
    raise InputError(f"no such file or folder: {path!r}{_beside(path)}")


def _beside(path: str) -> str:
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return ""
    import difflib

    close = difflib.get_close_matches(name, sorted(os.listdir(folder or ".")), n=1)
    return f"; did you mean {os.path.join(folder, close[0])!r}?" if close else ""


def _folder(path: str) -> list[str]:
    found: list[str] = []
    other: list[str] = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for name in names:
            if name[0] not in "._":
                (other if kind_of(name) is None else found).append(os.path.join(folder, name))
    if not found:
        what = f"only {listed(sorted(map(os.path.basename, other)))}" if other else "nothing"
        raise InputError(f"{path}: no file of a known kind in this folder, {what}")
    return sorted(found, key=natural)


def natural(path: str) -> list[tuple[int, int, str]]:
    """A key that sorts part-2 before part-10."""
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in re.findall(r"\d+|\D+", path)]


def partitions(file: str) -> dict[str, str | None]:
    """The columns that the folders of a file name, as in ``year=2024/month=1/x.parquet``; None is a missing value."""
    pairs = (folder.partition("=") for folder in os.path.dirname(file).split(os.sep))
    values = {unquote(key): unquote(value) for key, equals, value in pairs if equals and key}
    return {key: None if value == "__HIVE_DEFAULT_PARTITION__" else value for key, value in values.items()}


def total_size(files: Iterable[str]) -> int:
    """Bytes, of what is there."""
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))
