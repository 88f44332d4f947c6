"""What a project wants of the doctor: the table ``[tool.batchnorm.doctor]`` of its ``pyproject.toml``."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from batchnorm._errors import ConfigError
from batchnorm.probes.health.finding import SEVERITIES, Diagnosis, Severity
from batchnorm.probes.health.rule import matches, selected

_KEYS = ("select", "ignore", "layers", "fail-on")


@dataclass(frozen=True)
class DoctorConfig:
    """Which rules apply where.

    Attributes:
        select: codes, names or patterns; None for all.
        ignore: likewise, left out.
        layers: patterns of layers, and the codes that are ignored there: ``{"backbone.*": ("BN001",)}``.
        fail_on: the mildest severity that fails; None for never.
    """

    select: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fail_on: Severity | None = "warning"

    def without_ignored(self, diagnosis: Diagnosis) -> Diagnosis:
        """The findings that no pattern of ``layers`` sets aside."""
        kept = tuple(
            finding
            for finding in diagnosis
            if not any(
                fnmatch.fnmatchcase(finding.layer, pattern) and any(matches(finding, code) for code in codes)
                for pattern, codes in self.layers.items()
            )
        )
        return replace(diagnosis, findings=kept)

    def fails(self, diagnosis: Diagnosis) -> bool:
        """Whether a finding is as bad as ``fail_on``, or worse."""
        if self.fail_on is None or diagnosis.worst is None:
            return False
        return SEVERITIES.index(diagnosis.worst) <= SEVERITIES.index(self.fail_on)


def read_config(path: Path) -> DoctorConfig:
    """The table of ``path``; the defaults where it has none.

    Raises:
        ConfigError: (ValueError) the file cannot be read, an unknown key, a rule that does not exist.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error
    table: Any = document
    for key in ("tool", "batchnorm", "doctor"):
        table = table.get(key, {}) if isinstance(table, dict) else {}
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise ConfigError(f"{path}: expected {', '.join(_KEYS)} in [tool.batchnorm.doctor], got {unknown[0]!r}")
    layers = table.get("layers", {})
    if not isinstance(layers, dict):
        raise ConfigError(f"{path}: expected layers to be a table of patterns and codes, got {layers!r}")
    fail_on = table.get("fail-on", "warning")
    if fail_on not in (*get_args(Severity), "never"):
        raise ConfigError(f"{path}: expected fail-on to be error, warning, info or never, got {fail_on!r}")
    return DoctorConfig(
        None if "select" not in table else _codes(path, "select", table["select"]),
        _codes(path, "ignore", table.get("ignore", [])),
        {pattern: _codes(path, f"layers.{pattern}", codes) for pattern, codes in layers.items()},
        None if fail_on == "never" else fail_on,
    )


def find_config(folder: Path) -> Path | None:
    """The nearest ``pyproject.toml`` at or above ``folder``."""
    for place in (folder, *folder.parents):
        if (place / "pyproject.toml").is_file():
            return place / "pyproject.toml"
    return None


def _codes(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{path}: expected {key} to be a list of codes, got {value!r}")
    try:
        selected(value)
    except ValueError as error:
        raise ConfigError(f"{path}: {key}: {error}") from error
    return tuple(value)
