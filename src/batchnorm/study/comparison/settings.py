"""What a comparison does, as plain data: written to ``config.toml`` before anything is measured, read by a resume."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from batchnorm._errors import ConfigError, InputError, RecordsError

KIND = "comparison"
# Half-decades. Adaptive optimizers scale their steps themselves and take smaller rates.
RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "adam": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    "adamw": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}
_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison, whole. What is measured follows from this and from the time that a step takes (``budget``).

    Attributes:
        model, data: how they were called, for the page.
        variants: names; the first is what the others are compared with.
        lrs: the rates that are searched; one is taken as it is. ``auto``: they are a grid that a small budget may thin.
        seeds, seed: ``seed, seed + 1, ...`` are measured; the search has a seed of its own.
        budget: seconds for everything, 0 where ``steps`` says how long a run is.
        steps: of a measured run; 0 where the budget says it.
        metric, higher: what is compared, and whether more of it is better.
        task: "classification" or "regression"; ``classes`` is 0 for the latter.
        optimizer, batch_size, device, amp, compile: as :func:`batchnorm.compare` takes them.
        workers, threads: runs side by side as the budget was planned, and torch's threads of each.
        samples: of the training, validation and test part (batches, for loaders).
        fingerprint: of the data and the initial weights: a resume with others is refused.
        notes: what was decided about model and data, in sentences.
        command: the command line that does it again.
    """

    model: str
    data: str
    variants: tuple[str, ...]
    lrs: tuple[float, ...]
    auto: bool
    seeds: int
    seed: int
    budget: float
    steps: int
    metric: str
    higher: bool
    task: str
    classes: int
    optimizer: str
    batch_size: int
    device: str
    amp: str
    compile: bool
    workers: int
    threads: int
    samples: tuple[int, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def reference(self) -> str:
        """The variant that the others are compared with."""
        return self.variants[0]

    @property
    def search_seed(self) -> int:
        """The seed of the search: none of those that are measured."""
        return self.seed + self.seeds

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {"kind": KIND, **plain}

    def to_toml(self) -> str:
        """The configuration as TOML, every key written out."""
        return "".join(f"{key} = {_toml(value)}\n" for key, value in self.to_mapping().items())

    @classmethod
    def load(cls, path: Path) -> CompareConfig:
        """Read what :meth:`to_toml` wrote.

        Raises:
            RecordsError: the file is not there or is not a comparison's.
        """
        raw = read_raw(path)
        if raw.pop("kind", None) != KIND:
            raise RecordsError(f"expected the configuration of a comparison, got {path}: choose another folder")
        try:
            values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}
            return cls(**values)
        except TypeError as error:
            raise RecordsError(f"expected the configuration of a comparison, got {path}: {error}") from error

    def check_same(self, other: CompareConfig) -> None:
        """Raise a ConfigError where ``other``, which asks to go on with this comparison, would measure something else.

        How many workers do it makes no difference, nor by which words it was called.
        """
        free = {"workers", "command", "notes", "model", "data", "threads"}
        for key, value in vars(self).items():
            asked = getattr(other, key)
            if key not in free and asked != value:
                what = {"fingerprint": "other data or another model (their values differ)"}.get(
                    key, f"{key} = {asked!r} where it began with {value!r}"
                )
                raise ConfigError(f"cannot go on with this comparison: {what}; choose another folder")


def read_raw(path: Path) -> dict[str, Any]:
    """A TOML file as it stands.

    Raises:
        RecordsError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordsError(f"cannot read {path}: {error}: it is written when a comparison begins") from error


def seconds(budget: str | float) -> float:
    """``45s``, ``10m``, ``1h30m``, or a number of seconds.

    Raises:
        InputError: anything else.
    """
    if isinstance(budget, Real) and not isinstance(budget, bool):
        value = float(budget)
    else:
        found = _PARTS.fullmatch(str(budget).replace(" ", "").lower())
        parts = found.groups() if found and any(found.groups()) else None
        value = math.nan if parts is None else sum(float(p or 0) * f for p, f in zip(parts, (3600, 60, 1), strict=True))
    if not 0 < value < float("inf"):
        raise InputError(f"expected a budget such as 45s, 10m or 1h30m, got {budget!r}")
    return value


def rates(lrs: str | float | Sequence[float], optimizer: str) -> tuple[float, ...]:
    """The learning rates to search, in order.

    Raises:
        InputError: one that is not above 0, or none.
    """
    if isinstance(lrs, str):
        if lrs != "auto":
            raise InputError(f"expected lrs='auto' or a list of rates, got {lrs!r}")
        return RATES.get(optimizer, RATES["sgd"])
    found = tuple(sorted({float(rate) for rate in ([lrs] if isinstance(lrs, int | float) else lrs)}))
    if not found or not all(0 < rate < float("inf") for rate in found):
        raise InputError(f"expected learning rates above 0, got {list(found)}")
    return found


def replaced(config: CompareConfig, **changes: Any) -> CompareConfig:
    """A copy with other values."""
    return dataclasses.replace(config, **changes)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # JSON's strings are TOML's, but for DEL, which no name of ours holds.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
