"""A run's folder: ``config.toml``, ``records.jsonl``, ``summary.json`` (and ``report.html``, written by the report)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from batchnorm._errors import ConfigError, OutputError, RecordsError
from batchnorm.study import records
from batchnorm.study.config import StudyConfig, differences
from batchnorm.study.document import Summary
from batchnorm.study.plan import Run
from batchnorm.study.records import Record, Records

try:
    import fcntl
except ImportError:  # not a POSIX system: there, two studies in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

ENVIRONMENT = Run("environment", "environment", "environment", 0, 0, 0.0)


@dataclass(frozen=True)
class RunFolder:
    """The files of one study."""

    path: Path

    @property
    def config_file(self) -> Path:
        """The configuration, every key written out."""
        return self.path / "config.toml"

    @property
    def records_file(self) -> Path:
        """The records, one JSON object a line."""
        return self.path / "records.jsonl"

    @property
    def summary_file(self) -> Path:
        """The document made from the records."""
        return self.path / "summary.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other studies out of the folder for the block; the folder is made where it is missing.

        The lock is the operating system's and ends with the process, however that ends: the file ``.lock`` that a
        killed study leaves behind holds nobody up. What such a study left half written is cleared away.

        Raises:
            RecordsError: a study is running in the folder.
            OutputError: the folder cannot be made or written.
        """
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        lock = self._take_lock()
        try:
            for name in (self.config_file.name, self.records_file.name, self.summary_file.name):
                for rest in self.path.glob(f".{name}.*.part"):
                    rest.unlink(missing_ok=True)
            yield
        finally:
            # While it is still held: who opened the file meanwhile sees that it is gone and makes a new one.
            self._lock_file.unlink(missing_ok=True)
            lock.close()
            if made:
                with contextlib.suppress(OSError):  # it holds something, as it should
                    self.path.rmdir()

    @property
    def _lock_file(self) -> Path:
        return self.path / ".lock"

    def _take_lock(self) -> IO[str]:
        while True:
            try:
                lock = self._lock_file.open("a+")
            except OSError as error:
                if self.path.is_dir():
                    raise OutputError(
                        f"cannot write into {self.path}: {(error.strerror or str(error)).lower()}"
                    ) from error
                raise self._unusable(error) from error
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                lock.close()
                who = f" (process {holder})" if holder else ""
                raise RecordsError(
                    f"a study is running in {self.path}{who}: wait for its end, or choose another folder"
                ) from None
            except OSError:
                return lock  # a file system that knows no locks
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), self._lock_file.stat()):
                    lock.truncate(0)
                    lock.write(str(os.getpid()))
                    lock.flush()
                    return lock
            lock.close()  # it was let go and removed between our opening and locking it

    def _unusable(self, error: OSError) -> OutputError:
        return OutputError(f"cannot use {self.path} as the study's folder: {error.strerror or error}")

    def start(self, config: StudyConfig) -> Records:
        """Begin a study: make the folder and write its configuration and environment.

        Raises:
            RecordsError: the folder is not empty.
            OutputError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            occupied = sorted(item.name for item in self.path.iterdir() if item != self._lock_file)
        except OSError as error:
            raise self._unusable(error) from error
        if occupied:
            what = "a study" if self.config_file.name in occupied else f"other files ({occupied[0]})"
            raise RecordsError(f"{self.path} already holds {what}: resume it, or choose another folder")
        block = environment(config.seed)
        records.write_whole(self.config_file, config.to_toml().encode())
        records.append(self.records_file, block)
        return Records(tuple(block))

    def resume(self, config: StudyConfig | None) -> tuple[StudyConfig, Records]:
        """Open a started study again, cutting off what an interruption left torn.

        Raises:
            ConfigError: ``config`` is not the one that the study was started with.
            RecordsError: the records are damaged before their end.
            OutputError: the folder cannot be written.
        """
        saved = self.config()
        if config is not None and config != saved:
            changed = differences(saved, config)
            shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise ConfigError(f"cannot resume {self.path} with another configuration ({shown}): choose another folder")
        if not os.access(self.path, os.W_OK):
            raise OutputError(f"cannot write into {self.path}: permission denied")
        if not self.records_file.exists():
            records.append(self.records_file, environment(saved.seed))
        found = records.repair(self.records_file)
        if ENVIRONMENT.id not in found.finished():
            records.append(self.records_file, environment(saved.seed))
            found = Records(records.read(self.records_file).lines, found.dropped)
        return saved, found

    def started(self) -> bool:
        """Whether a study was started here."""
        return self.config_file.is_file()

    def config(self) -> StudyConfig:
        """The configuration that the study was started with.

        Raises:
            RecordsError: there is no study here.
            ConfigError: its configuration cannot be read.
        """
        if not self.started():
            raise RecordsError(f"{self.path} holds no study: expected its {self.config_file.name} and records.jsonl")
        return StudyConfig.load(self.config_file)

    def write_summary(self, summary: Summary) -> None:
        """Write ``summary.json``, whole or not at all."""
        records.write_whole(self.summary_file, summary.to_json().encode())

    def read_summary(self) -> Summary:
        """Read ``summary.json``.

        Raises:
            RecordsError: there is none, or it is not a summary of this version.
        """
        try:
            text = self.summary_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordsError(f"cannot read {self.summary_file}: {error}: resume or rebuild the study") from error
        return Summary.from_json(text)


def environment(seed: int) -> list[Record]:
    """What the figures were measured on, as records of section ``environment``."""
    run = Run(ENVIRONMENT.id, "environment", "environment", seed, 0, 0.0)
    facts = {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "scikit-learn": _version("scikit-learn"),
        "batchnorm": _version("batchnorm"),
        "implementation": _implementation(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    return [*(run.record(0, name, value) for name, value in facts.items()), run.finished(0)]


def _implementation() -> str:
    # The one fact that takes an import of torch: the kernels decide what a step costs, and the last bits of results.
    from batchnorm.ops import native

    status = native.status()
    return f"{status.active}: {status.reason}" if status.reason else status.active


def _version(package: str) -> str:
    if package == "batchnorm":
        from batchnorm import __version__

        return __version__
    # Asked of the installed metadata: importing torch for its version would cost seconds.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
