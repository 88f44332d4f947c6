"""What a study does, as plain data: frozen dataclasses, read from and written to TOML.

Every key has a default, so a file holds only what differs; a key that is not known is an error, because a misspelt one
would otherwise quietly run the default. ``PRESETS`` holds the two ready-made studies, ``default`` and ``quick``.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from batchnorm._errors import ConfigError

SECTION_NAMES = ("headline", "deep", "distribution", "preprocessing", "identity")


@dataclass(frozen=True)
class Headline:
    """Steps to 90% with and without BN. ``lrs`` is the grid over which the baseline is tuned, on validation."""

    seeds: int = 5
    lrs: tuple[float, ...] = (0.3, 1.0, 2.0, 3.0, 4.0, 5.0)
    tune_steps: int = 1500
    steps: int = 2000
    batch_steps: int = 1000
    conservative_lr: float = 0.3
    conservative_steps: int = 2500
    wide_init: float = 4.0
    wide_steps: int = 500
    wide_lrs: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0)
    relu_lrs: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6)
    counter_steps: int = 400
    hot_factor: float = 30.0
    hot_steps: int = 200


@dataclass(frozen=True)
class Deep:
    """The net that does not train without BN: ``layers`` x 100 sigmoid, at each of ``lrs``."""

    layers: int = 6
    lrs: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    lr: float = 1.0
    steps: int = 2000
    batch_steps: int = 500
    wide_init: float = 4.0
    wide_layers: int = 8
    wide_lr: float = 0.3


@dataclass(frozen=True)
class Distribution:
    """The input of the last hidden layer while the net learns, looked at every ``every`` steps.

    ``slow`` says whether the pair is run at ``slow_lr`` as well.
    """

    lr: float = 2.0
    slow: bool = True
    slow_lr: float = 0.3
    steps: int = 800
    every: int = 20
    noise_shift: float = 1.0
    noise_scale: float = 0.75


@dataclass(frozen=True)
class Preprocessing:
    """Raw, centred, standardized, rotated and whitened inputs."""

    table_lrs: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    table_steps: int = 150
    linear_lrs: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    linear_steps: int = 150
    deep_lr: float = 1.0
    deep_steps: int = 1000


@dataclass(frozen=True)
class Identity:
    """What gamma and beta are for: an exact inverse, and a spiral that needs them."""

    lr: float = 2.0
    steps: int = 1200
    turns: float = 1.5
    width: int = 16
    points: int = 1000
    grid: int = 41


@dataclass(frozen=True)
class StudyConfig:
    """A whole study.

    Seeds are ``seed, seed + 1, ...``: ``seeds`` of them in each section, ``headline.seeds`` in the headline.

    Raises:
        ConfigError: an unknown section, or a count or rate that is not positive.
    """

    preset: str = "default"
    seed: int = 0
    seeds: int = 3
    batch: int = 60
    sections: tuple[str, ...] = SECTION_NAMES
    headline: Headline = field(default_factory=Headline)
    deep: Deep = field(default_factory=Deep)
    distribution: Distribution = field(default_factory=Distribution)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    identity: Identity = field(default_factory=Identity)

    def __post_init__(self) -> None:
        unknown = [name for name in self.sections if name not in SECTION_NAMES]
        if unknown:
            raise ConfigError(f"unknown section {unknown[0]!r}: expected some of {', '.join(SECTION_NAMES)}")
        if not self.sections:
            raise ConfigError(f"expected at least one section, got none: choose from {', '.join(SECTION_NAMES)}")
        if self.seed < 0:
            raise ConfigError(f"expected seed of 0 or more, got {self.seed}")
        _require_positive(self, "")
        # The page's order is the study's order, whatever order was asked for.
        ordered = tuple(name for name in SECTION_NAMES if name in self.sections)
        object.__setattr__(self, "sections", ordered)

    def with_options(
        self, *, seed: int | None = None, seeds: int | None = None, sections: tuple[str, ...] | None = None
    ) -> StudyConfig:
        """The same study with another base seed, number of seeds (the headline's too) or choice of sections.

        Raises:
            ConfigError: an unknown section, or a number out of range.
        """
        config = self
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        if seeds is not None:
            config = dataclasses.replace(
                config, seeds=seeds, headline=dataclasses.replace(config.headline, seeds=seeds)
            )
        if sections is not None:
            config = dataclasses.replace(config, sections=tuple(sections))
        return config

    def seed_list(self, section: str = "") -> tuple[int, ...]:
        """The seeds that ``section`` uses."""
        count = self.headline.seeds if section == "headline" else self.seeds
        return tuple(range(self.seed, self.seed + count))

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values (tuples become lists)."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    def to_toml(self) -> str:
        """The configuration as TOML, every key written out."""
        plain = self.to_mapping()
        lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items() if not isinstance(value, dict)]
        for name, table in plain.items():
            if isinstance(table, dict):
                lines += ["", f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, source: str = "the configuration") -> StudyConfig:
        """Read a configuration; what the text leaves out has its default (``preset`` chooses which).

        Raises:
            ConfigError: not TOML, an unknown key or preset, a value of the wrong type or out of range.
        """
        try:
            raw = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source} is not valid TOML: {error}") from error
        preset = raw.get("preset", "default")
        if preset not in PRESETS:
            raise ConfigError(f"{source}: unknown preset {preset!r}, expected one of {', '.join(PRESETS)}")
        return _fill(PRESETS[preset], raw, source, "")

    @classmethod
    def load(cls, path: str | Path) -> StudyConfig:
        """Read a configuration from a file.

        Raises:
            ConfigError: the file cannot be read, or as :meth:`from_toml`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        return cls.from_toml(text, str(path))


def differences(saved: StudyConfig, asked: StudyConfig) -> list[str]:
    """What differs between two configurations, one line each: ``headline.steps: 2000 saved, 100 asked``."""
    before, after = _flat(saved.to_mapping()), _flat(asked.to_mapping())
    return [f"{key}: {before[key]} saved, {after[key]} asked" for key in before if before[key] != after[key]]


Table = TypeVar("Table")


def _fill(default: Table, raw: Mapping[str, Any], source: str, prefix: str) -> Table:
    hints = typing.get_type_hints(type(default))
    names = [item.name for item in dataclasses.fields(default)]  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in names:
            where = f" in [{prefix[:-1]}]" if prefix else ""
            raise ConfigError(f"{source}: unknown key {key!r}{where}, expected one of {', '.join(names)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: expected a table for {key!r}, got {value!r}")
            changes[key] = _fill(getattr(default, key), value, source, f"{key}.")
        else:
            changes[key] = _typed(value, hints[key], f"{source}: {prefix}{key}")
    try:
        return dataclasses.replace(default, **changes)  # type: ignore[type-var]
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        (item, _) = typing.get_args(hint)
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{where}: expected a list of {item.__name__}, got {value!r}")
        return tuple(_typed(element, item, where) for element in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _require_positive(table: Any, prefix: str) -> None:
    for item in dataclasses.fields(table):
        value = getattr(table, item.name)
        if dataclasses.is_dataclass(value):
            _require_positive(value, f"{item.name}.")
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            counts = isinstance(number, int | float) and not isinstance(number, bool)
            # `not >` rather than `<=`: NaN is refused too. A seed may be 0.
            if counts and item.name != "seed" and not 0 < number < float("inf"):
                raise ConfigError(f"expected a positive {prefix}{item.name}, got {number}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


PRESETS: dict[str, StudyConfig] = {
    "default": StudyConfig(),
    "quick": StudyConfig(
        preset="quick",
        seeds=3,
        headline=Headline(
            seeds=3,
            lrs=(1.0, 2.0, 4.0),
            steps=1100,
            batch_steps=300,
            tune_steps=900,
            conservative_steps=1600,
            wide_steps=200,
            wide_lrs=(0.5, 1.0),
            relu_lrs=(0.2, 0.4),
            hot_steps=100,
        ),
        deep=Deep(lrs=(1.0, 3.0), steps=500, batch_steps=150, wide_layers=6),
        distribution=Distribution(steps=700, slow=False),
        preprocessing=Preprocessing(
            table_lrs=(0.1, 1.0), linear_lrs=(2.0, 10.0, 20.0, 50.0), linear_steps=80, deep_steps=500
        ),
        identity=Identity(steps=500, turns=1.25),
    ),
}
