"""A transform under way: what is done of it, so that it can be gone on with, and that nothing is left half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batchnorm._errors import BatchnormError, InputError, OutputError
from batchnorm.preprocessing.sinks.places import Plan
from batchnorm.preprocessing.sinks.sink import Sink, State

PARTIAL = ".partial"
_FORMAT = {"format": "batchnorm.transform", "version": 1}
_WORDS = {
    "statistics": "the statistics are others",
    "files": "the data have changed, or are others",
    "options": "the options are others",
    "batch_rows": "batch_rows is another",
}


class Job:
    """The folder ``<target>.partial``: finished files, the one under way, and a manifest that says how far it is.

    ``file``: how many are finished. ``rows_before``: their rows.
    """

    def __init__(self, plan: Plan, task: dict[str, Any], keep: bool) -> None:
        self.plan = plan
        self.task = task
        self.keep = keep
        self.overwrite = False
        self.work = plan.target.with_name(plan.target.name + PARTIAL)
        self.scratch = self.work / "scratch"
        self.file = 0
        self.rows_before = 0
        self._state: State | None = None
        self._under_way: tuple[int, Sink] | None = None

    def begin(self) -> None:
        """Make the folder."""
        self.work.mkdir()
        self._write_manifest()

    def resume(self, manifest: dict[str, Any]) -> None:
        """Take over the folder of an interrupted run of the same task. Raises InputError for another's."""
        for name, words in _WORDS.items():
            if manifest["task"].get(name) != json.loads(json.dumps(self.task[name])):
                raise InputError(
                    f"cannot go on with {self.work}: {words} than when it was begun; begin anew by replacing it"
                )
        self.file, self.rows_before, self._state = manifest["file"], manifest["rows_before"], manifest["state"]

    def target(self, name: str) -> Path:
        """Where a finished file of this name goes."""
        path = self.work / "done" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        return path

    def restore(self, sink: Sink) -> int:
        """Let the sink of the file under way go on; the number of rows that it has."""
        self._under_way = (self.file, sink)
        state, self._state = self._state, None
        return sink.rows if state is not None and sink.restore(state) else 0

    def checkpoint(self, number: int, sink: Sink) -> None:
        """Note how far file ``number`` is."""
        state = sink.checkpoint()
        if state is not None:
            self.file, self._state = number, state
            self._write_manifest()

    def finish_file(self, number: int, sink: Sink) -> None:
        """Close a file and note that it is whole."""
        sink.close()
        self.file, self._state, self._under_way = number + 1, None, None
        self.rows_before += sink.rows
        self._write_manifest()

    def finish(self) -> None:
        """Move the result to its place, at once."""
        target, done = self.plan.target, self.work / "done"
        if self.plan.folder:
            replaced = self.work / "replaced"
            if target.is_dir():
                target.rename(replaced)
            try:
                done.rename(target)
            except OSError:
                if replaced.exists():
                    replaced.rename(target)
                raise
        else:
            os.replace(done / target.name, target)
        shutil.rmtree(self.work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if not isinstance(error, Exception):  # interrupted
            with contextlib.suppress(OSError):
                if self._under_way is not None and self._under_way[1].rows > 0:
                    self.checkpoint(*self._under_way)
        if self._under_way is not None:
            with contextlib.suppress(OSError):
                self._under_way[1].release()
        nothing = self.file == 0 and self._state is None
        if nothing or (isinstance(error, Exception) and not self.keep):
            shutil.rmtree(self.work, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, BatchnormError):
            raise OutputError(f"cannot write {self.plan.target}: {reason_of(error)}") from error

    def _write_manifest(self) -> None:
        manifest = {**_FORMAT, "task": self.task, "overwrite": self.overwrite, "file": self.file}
        text = json.dumps({**manifest, "rows_before": self.rows_before, "state": self._state})
        beside = self.work / "manifest.new"
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.work / "manifest.json")


def open_job(plan: Plan, task: dict[str, Any], *, resume: bool, overwrite: bool) -> Job:
    """A new job, or the interrupted one. Raises OutputError where something is in its way, InputError for another's."""
    target = plan.target
    job = Job(plan, task, keep=resume)
    if target.is_dir() != plan.folder and target.exists():
        what = "a folder, expected the name of a file" if target.is_dir() else "a file, expected a folder"
        raise OutputError(f"cannot write {target}: it is {what}")
    try:
        if job.work.is_dir() and {item.name for item in job.work.iterdir()} <= {"manifest.new"}:
            shutil.rmtree(job.work)  # killed before it began
        manifest = read_manifest(job.work) if job.work.exists() else None
        # Who was allowed to replace the target when it began is so when it goes on.
        job.overwrite = overwrite or (resume and manifest is not None and manifest["overwrite"])
        empty = plan.folder and target.is_dir() and not any(target.iterdir())
        if target.exists() and not job.overwrite and not empty:
            raise OutputError(f"{target} exists already: name another place, or replace it (overwrite, --force)")
        if manifest is not None and resume:
            job.resume(manifest)
            return job
        if manifest is not None:
            if not overwrite:
                raise OutputError(
                    f"{job.work} holds an interrupted transform, {rows_of(manifest):,} rows of it: go on with it "
                    "(resume, --resume) or begin anew (overwrite, --force)"
                )
            shutil.rmtree(job.work)
        job.begin()
    except OSError as error:
        if isinstance(error, BatchnormError):
            raise
        raise OutputError(f"cannot write {target}: {reason_of(error)}") from error
    return job


def read_manifest(work: Path) -> dict[str, Any]:
    """How far an interrupted transform is. Raises InputError for a folder that is none."""
    try:
        manifest: dict[str, Any] = json.loads((work / "manifest.json").read_text(encoding="utf-8"))
        if any(manifest.get(key) != value for key, value in _FORMAT.items()):
            raise ValueError("not a manifest")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{work} is in the way, and no interrupted transform of this version: move it away") from error
    return manifest


def reason_of(error: OSError) -> str:
    """The system's words for what is wrong, on one line."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def interrupted_rows(dst: str | PathLike[str]) -> int | None:
    """How many rows of ``dst`` an interrupt has left for ``resume``; None where there is nothing to go on with."""
    target = Path(dst)
    try:
        manifest = read_manifest(target.with_name(target.name + PARTIAL))
    except InputError:
        return None
    return rows_of(manifest)


def rows_of(manifest: dict[str, Any]) -> int:
    """The rows that are done, of finished files and the one under way."""
    return int(manifest["rows_before"] + (manifest["state"] or {}).get("rows", 0))
