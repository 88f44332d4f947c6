"""Which file of the result belongs to which file of the data, and that none of them is in the way of another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from batchnorm._errors import InputError, OutputError
from batchnorm.preprocessing.sources.paths import COMPRESSED, find_files, kind_of

ARRAYS = ("npy", "npz", "safetensors")
TABLES = ("csv", "parquet", "arrow")
_WRITTEN = ".npy .npz .safetensors .csv .tsv .parquet .arrow .feather"


@dataclass(frozen=True)
class Item:
    """A file of the data, and the name of its result within the target (or of the target itself)."""

    source: Path
    target: str


@dataclass(frozen=True)
class Plan:
    """All files in order; ``target`` is a folder that holds them, or the one file."""

    label: str
    items: tuple[Item, ...]
    target: Path
    folder: bool


def plan(src: str | PathLike[str] | Sequence[str | PathLike[str]], dst: str | PathLike[str]) -> Plan:
    """What :func:`transform_file` is to write where.

    Raises InputError where ``src`` is not there or ``dst`` cannot be its result, OutputError where the folder of
    ``dst`` is not there.
    """
    given = [src] if isinstance(src, (str, PathLike)) else src
    paths = [os.path.expanduser(os.fspath(path)) for path in given]
    label, files, kind = find_files(paths)
    target = Path(os.path.expanduser(os.fspath(dst)))
    if kind == "image":
        if len(paths) > 1 or kind_of(str(target)) not in (*ARRAYS, *TABLES):
            raise InputError(f"images become one array: name a file for the result, such as {target.name}.npy")
        made = Plan(label, (Item(Path(paths[0]), target.name),), target, folder=False)
    elif len(paths) == 1 and os.path.isfile(paths[0]):
        if target.is_dir() or os.fspath(dst).endswith(os.sep):
            target = target / _written(Path(paths[0]).name)
        made = Plan(label, (Item(Path(paths[0]), target.name),), target, folder=False)
    else:
        if kind_of(str(target)) is not None:
            raise InputError(
                f"{label} is more than one file, whose results are files of a folder: {target} is the name of a file"
            )
        only = paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else None
        root = only or os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        items = tuple(Item(Path(file), _written(os.path.relpath(file, root))) for file in files)
        made = Plan(label, items, target, folder=True)
    _check(made, [Path(path) for path in paths if os.path.isdir(path)])
    return made


def _written(name: str) -> str:
    """What is read compressed is written as it is."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSED else name


def _check(made: Plan, folders: Sequence[Path]) -> None:
    for item in made.items:
        if kind_of(item.target) not in (*ARRAYS, *TABLES) or Path(item.target).suffix in COMPRESSED:
            raise InputError(f"cannot tell by its suffix how to write {item.target!r}; known are {_WRITTEN}")
    names = [item.target for item in made.items]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise InputError(f"{made.label} holds two files that would both become {twice!r}: transform them apart")
    target = made.target.resolve()
    for folder in folders:
        if target == folder.resolve() or folder.resolve() in target.parents:
            raise InputError(f"the result {made.target} would lie among the data in {folder}: name another place")
    for item in made.items:
        source = item.source.resolve()
        if source == target or (made.target.exists() and item.source.samefile(made.target)):
            raise InputError(f"{made.target} is the data themselves: name another file for the result")
        if target in source.parents or source in target.parents:
            raise InputError(
                f"the result {made.target} and the data {item.source} lie in each other: name another place"
            )
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {made.target}: there is no folder {made.target.parent}, create it first")
