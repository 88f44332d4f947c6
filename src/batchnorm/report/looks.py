"""A watch's records, layer by layer, reduced to the few numbers that a page or a terminal has room for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from batchnorm._errors import RecordsError

Record = Mapping[str, Any]
Triple = tuple[float, float, float]

KEYS = ("step", "layer", "mode")
LEVELS = (15.0, 50.0, 85.0)


@dataclass(frozen=True)
class Look:
    """One look at one layer. What does not apply, or is not finite in every unit, is None.

    Attributes:
        step: of the pass.
        typical: percentiles 15, 50 and 85 of the median unit's input.
        gap: the largest ``|mean_gap|`` of a unit, in running deviations.
        gap_channel: which channel that is.
        ratio: the least and the largest ``var_ratio``.
        dead: share of units, 0 to 1.
        saturated: share of values, 0 to 1.
        gradient: the norm of the output's gradient over all units looked at.
        weight: percentiles 15, 50 and 85 of gamma over units.
        bias: the same of beta.
        finite: whether all that was seen of the input was.
    """

    step: int
    typical: Triple | None
    gap: float | None
    gap_channel: int | None
    ratio: tuple[float, float] | None
    dead: float | None
    saturated: float | None
    gradient: float | None
    weight: Triple | None
    bias: Triple | None
    finite: bool

    @property
    def furthest(self) -> float | None:
        """The ``var_ratio`` that is furthest from 1, as a factor: 0.4 is further than 2."""
        return None if self.ratio is None else max(self.ratio, key=_factor)

    @property
    def factor(self) -> float | None:
        """By how much it is off: 2.5 for 0.4 and for 2.5."""
        return None if self.spread is None else math.exp(self.spread)

    @property
    def spread(self) -> float | None:
        """``|log var_ratio|`` of that: 0.69 is a factor of 2."""
        return None if self.furthest is None else _factor(self.furthest)

    @property
    def severity(self) -> float:
        """How bad it is: the worst of mean gap, ``|log var_ratio|``, dead and saturated shares; infinite with NaN.

        All are 0 where nothing is wrong and about 1 where much is.
        """
        found = (self.gap, self.spread, self.dead, self.saturated)
        return max((value for value in found if value is not None), default=0.0) if self.finite else math.inf


@dataclass(frozen=True)
class Layer:
    """A layer with its looks in the order of steps: those in training, if there are any, else those in evaluation."""

    name: str
    type: str
    channels: int | None
    mode: str
    looks: tuple[Look, ...]

    @property
    def title(self) -> str:
        """Its name, also where it is the model itself."""
        return self.name or "the model"

    @property
    def said(self) -> str:
        """Its name in a sentence."""
        return f"layer {self.name}" if self.name else "the model"

    @cached_property
    def last(self) -> Look:
        """The last look."""
        return self.looks[-1]


def layers_of(records: Iterable[Record]) -> list[Layer]:
    """The layers of ``records``, in the order in which they were first seen.

    Raises:
        RecordsError: there is no record, or one lacks a key.
    """
    found: dict[str, dict[str, dict[int, Record]]] = {}
    for record in records:
        missing = [key for key in KEYS if key not in record]
        if missing:
            raise RecordsError(
                f"expected records of a watch, with step, layer and mode; got one without {missing[0]!r}"
            )
        modes = found.setdefault(record["layer"], {})
        modes.setdefault(record["mode"], {})[record["step"]] = record
    if not found:
        raise RecordsError("expected records of a watch, got none: look at a training step before drawing")
    layers = []
    for name, modes in found.items():
        mode = "train" if "train" in modes else next(iter(modes))
        kept = [modes[mode][step] for step in sorted(modes[mode])]
        latest = kept[-1]
        looks = tuple(look_of(record) for record in kept)
        layers.append(Layer(name, str(latest.get("type") or ""), latest.get("channels"), mode, looks))
    return layers


def look_of(record: Record) -> Look:
    """The few numbers of one record."""
    gap, ratio, gradient = (_array(record.get(key)) for key in ("mean_gap", "var_ratio", "grad_norm"))
    worst = None if gap is None else int(np.argmax(np.where(np.isfinite(gap), abs(gap), -1.0)))
    known = None if ratio is None else ratio[np.isfinite(ratio)]
    typical: Any = record.get("typical")
    return Look(
        step=int(record["step"]),
        typical=(float(typical[0]), float(typical[1]), float(typical[2])) if _is_finite(typical) else None,
        gap=None if gap is None or worst is None else abs(float(gap[worst])),
        gap_channel=None if worst is None else _channel(record, worst),
        ratio=None if known is None or not len(known) else (float(known.min()), float(known.max())),
        dead=_share(record.get("dead")),
        saturated=_share(record.get("saturated")),
        gradient=None if gradient is None else float(np.sqrt(np.square(gradient[np.isfinite(gradient)]).sum())),
        weight=_triple(_array(record.get("weight"))),
        bias=_triple(_array(record.get("bias"))),
        finite=not record.get("count", 1) or record.get("mean") is None or _is_finite(record["mean"]),
    )


def worst_first(layers: Sequence[Layer]) -> list[Layer]:
    """By the severity of the last look; equals stay in the model's order."""
    return sorted(layers, key=lambda layer: -layer.last.severity)


def percent(share: float) -> str:
    """0.125 as "12.5%", 1.0 as "100%"."""
    return f"{100 * share:.3g}%"


def _factor(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0.0 else math.inf


def _array(values: Any) -> Any:
    """As float64 with NaN for None; None where no value is finite."""
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    return array if np.isfinite(array).any() else None


def _share(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _is_finite(values: Any) -> bool:
    return values is not None and all(value is not None and math.isfinite(value) for value in values)


def _triple(values: Any) -> Triple | None:
    if values is None:
        return None
    low, middle, high = np.percentile(values[np.isfinite(values)], LEVELS).tolist()
    return low, middle, high


def _channel(record: Record, place: int) -> int:
    units = record.get("units")
    return int(units[place]) if isinstance(units, Sequence) and place < len(units) else place
