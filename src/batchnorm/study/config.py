"""What a study does, as plain data: frozen dataclasses, read from and written to TOML.

Every key has a default, so a file holds only what differs; a key that is not known is an error, because a misspelt one
would otherwise quietly run the default. ``PRESETS`` holds the ready-made studies,
``default``, ``quick`` and ``full``; what a section may be told is in ``settings``.
"""

from __future__ import annotations

import dataclasses
import importlib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from batchnorm._errors import ConfigError
from batchnorm.study.settings.batches import Batches
from batchnorm.study.settings.cifar10 import Cifar10
from batchnorm.study.settings.convnet import Convnet
from batchnorm.study.settings.deep import Deep
from batchnorm.study.settings.distribution import Distribution
from batchnorm.study.settings.domains import Domains
from batchnorm.study.settings.headline import Headline
from batchnorm.study.settings.identity import Identity
from batchnorm.study.settings.initialisation import Initialisation
from batchnorm.study.settings.landscape import Landscape
from batchnorm.study.settings.mnist import Mnist
from batchnorm.study.settings.outside import Outside
from batchnorm.study.settings.preprocessing import Preprocessing
from batchnorm.study.settings.whitening import Whitening

# Sections on data that do not ship with scikit-learn, which run only where they are asked for by name.
OPT_IN = ("mnist", "cifar10")
# The page's order.
SECTION_NAMES = (
    "headline",
    "deep",
    "initialisation",
    "convnet",
    "distribution",
    "landscape",
    "outside",
    "preprocessing",
    "identity",
    "batches",
    "domains",
    "whitening",
    *OPT_IN,
)
DEFAULT_SECTIONS = tuple(name for name in SECTION_NAMES if name not in OPT_IN)


@dataclass(frozen=True)
class StudyConfig:
    """A whole study.

    Seeds are ``seed, seed + 1, ...``: ``seeds`` of them in each section that has no number of its own. ``data_dir`` is
    the folder with the files of the sections in ``OPT_IN``.

    Raises:
        ConfigError: an unknown section, or a count or rate that is not positive.
    """

    preset: str = "default"
    seed: int = 0
    seeds: int = 3
    batch: int = 60
    sections: tuple[str, ...] = DEFAULT_SECTIONS
    data_dir: str = ""
    headline: Headline = field(default_factory=Headline)
    deep: Deep = field(default_factory=Deep)
    initialisation: Initialisation = field(default_factory=Initialisation)
    convnet: Convnet = field(default_factory=Convnet)
    distribution: Distribution = field(default_factory=Distribution)
    landscape: Landscape = field(default_factory=Landscape)
    outside: Outside = field(default_factory=Outside)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    identity: Identity = field(default_factory=Identity)
    batches: Batches = field(default_factory=Batches)
    domains: Domains = field(default_factory=Domains)
    whitening: Whitening = field(default_factory=Whitening)
    mnist: Mnist = field(default_factory=Mnist)
    cifar10: Cifar10 = field(default_factory=Cifar10)

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
        self,
        *,
        seed: int | None = None,
        seeds: int | None = None,
        sections: tuple[str, ...] | None = None,
        data_dir: str | None = None,
    ) -> StudyConfig:
        """The same study with another base seed, number of seeds (everywhere), choice of sections or folder of data.

        Raises:
            ConfigError: an unknown section, or a number out of range.
        """
        config = self
        if seed is not None:
            config = dataclasses.replace(config, seed=seed)
        if seeds is not None:
            config = dataclasses.replace(config, seeds=seeds, **_with_seeds(config, seeds))
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        if sections is not None:
            config = dataclasses.replace(config, sections=tuple(sections))
        return config

    def seed_list(self, section: str = "") -> tuple[int, ...]:
        """The seeds that ``section`` uses."""
        count = getattr(getattr(self, section, None), "seeds", self.seeds)
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


def _with_seeds(config: StudyConfig, seeds: int) -> dict[str, Any]:
    """The sections that count seeds of their own, with ``seeds`` of them."""
    tables = {name: getattr(config, name) for name in SECTION_NAMES}
    return {name: dataclasses.replace(table, seeds=seeds) for name, table in tables.items() if hasattr(table, "seeds")}


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


def _preset(name: str, **options: Any) -> StudyConfig:
    """Every section in the form that its module of ``settings`` has for this preset."""
    tables = {item.name for item in dataclasses.fields(StudyConfig) if item.name in SECTION_NAMES}
    modules = {name: importlib.import_module(f"batchnorm.study.settings.{name}") for name in tables}
    forms = {section: getattr(module, name.upper()) for section, module in modules.items()}
    return StudyConfig(preset=name, **options, **forms)


PRESETS: dict[str, StudyConfig] = {
    "default": StudyConfig(),
    "quick": _preset("quick"),
    "full": _preset("full", seeds=5),
}
