"""Covariate shift as numbers: how fast the input of each layer moves. From a watch's records alone: no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from batchnorm._checks import check_not_negative
from batchnorm._errors import InputError, RecordsError
from batchnorm.probes.movement import chance, distances, in_units, wasserstein

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

Record = Mapping[str, Any]

PER = 100
"""Movement is given for so many steps."""

LEVELS = (15.0, 50.0, 85.0)
"""The percentiles of the paper's Figure 1, in per cent."""


KEYS = ("step", "layer", "mode", "count", "units", "levels", "quantiles", "std")

SAMPLE = 1024
"""A watch reads quantiles from so many values at most."""


def shift(records: Iterable[Record], skip: int = 100) -> list[dict[str, Any]]:
    """How far the distributions of each layer's inputs move per 100 steps.

    Two measures, between each look and the next: ``percentiles``, the mean way of the {15, 50, 85} percentiles
    (Ioffe & Szegedy 2015, Figure 1), and ``wasserstein``, the 1-Wasserstein distance over all recorded quantiles. Each
    is given in units of the unit's standard deviation at the earlier look (``_std``) and in the units of the input
    (``_absolute``): a net whose activations are small moves little in absolute numbers, and that is no merit. Of each
    there is the typical unit's (the median over units of a look, then the median over looks) and the worst unit's (the
    median over looks of each unit, then the largest; ``_worst``). All are times 100 / (steps between the looks).

    The first ``skip`` steps are left out. There, the inputs of a freshly initialised net without normalization have
    next to no spread; divided by so small a standard deviation every movement is huge, and the average of a whole run
    would say little else.

    What is added up is the way, not the distance at the end, and two looks at different batches differ by chance even
    where nothing is learned: the more so the smaller the batches and the closer the looks. ``wasserstein_std_chance``
    is what chance alone would give, if the values of a unit were independent (see :func:`~batchnorm.probes.chance`);
    a movement near it is none. Compare runs with equal batches and equal ``every``.

    Args:
        records: of a watch, in any order: mappings with ``step``, ``layer``, ``mode``, ``units`` (their indices),
            ``levels`` (per cent), ``quantiles`` (units x levels), ``std`` (one for each unit) and ``count``, values of
            a unit in a batch.
        skip: the first step that counts.

    Returns:
        A dictionary for each layer and mode, in the order in which they were first seen, with ``layer``, ``mode``,
        ``looks`` (how many counted), ``first`` and ``last`` (their steps), ``every`` (median steps between two),
        ``units``, and for each of ``percentiles`` and ``wasserstein``: ``_std``, ``_std_worst``, ``_absolute``,
        ``_absolute_worst``, and which unit is the worst in units of std, ``_unit``; and ``wasserstein_std_chance``. A
        number is None where fewer than two looks count, or where nothing finite is left: units without spread have no
        movement in units of std, and looks that hold NaN or infinite values are passed over, unit by unit.

    Raises:
        RecordsError: a record lacks a key.
        InputError: ``skip`` is negative; the looks at one layer differ in units or levels.
    """
    check_not_negative("skip", skip)
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        missing = [key for key in KEYS if key not in record]
        if missing:
            raise RecordsError(f"expected records of a watch, with {', '.join(KEYS)}; got one without {missing[0]!r}")
        looks = found.setdefault((record["layer"], record["mode"]), {})
        if record["step"] >= skip and record["quantiles"] is not None and record["std"] is not None:
            looks.setdefault(record["step"], record)
    return [_row(layer, mode, [looks[step] for step in sorted(looks)]) for (layer, mode), looks in found.items()]


def _row(layer: str, mode: str, looks: Sequence[Record]) -> dict[str, Any]:
    import numpy as np

    steps = [look["step"] for look in looks]
    row: dict[str, Any] = {
        "layer": layer,
        "mode": mode,
        "looks": len(looks),
        "first": steps[0] if steps else None,
        "last": steps[-1] if steps else None,
        "every": median(after - before for before, after in pairwise(steps)) if len(steps) > 1 else None,
        "units": len(looks[0]["quantiles"]) if looks else 0,
    }
    moved: dict[str, list[Array]] = {"percentiles": [], "wasserstein": []}
    by_chance: list[Array] = []
    spread: list[Sequence[float]] = []
    for before, after in pairwise(looks):
        if list(before["levels"]) != list(after["levels"]):
            raise InputError(f"expected one set of levels in all looks at {layer!r}: read one watch at a time")
        per = PER / (after["step"] - before["step"])
        first, second = before["quantiles"], after["quantiles"]
        columns = [_column(before["levels"], level) for level in LEVELS]
        # Infinite minus infinite is no number, and is passed over below.
        with np.errstate(invalid="ignore"):
            moved["percentiles"].append(per * distances(_chosen(first, columns), _chosen(second, columns)))
            moved["wasserstein"].append(per * wasserstein(first, second, before["levels"]))
            nothing = chance(first, before["levels"], min(before["count"], SAMPLE))
        by_chance.append(per * in_units(nothing, before["std"]))
        spread.append(before["std"])
    for name, ways in moved.items():
        absolute, worst, _ = _typical_and_worst(ways)
        row |= {f"{name}_absolute": absolute, f"{name}_absolute_worst": worst}
        relative, worst, unit = _typical_and_worst([in_units(way, std) for way, std in zip(ways, spread, strict=True)])
        row |= {
            f"{name}_std": relative,
            f"{name}_std_worst": worst,
            f"{name}_unit": None if unit is None else looks[0]["units"][unit],
        }
    row["wasserstein_std_chance"], _, _ = _typical_and_worst(by_chance)
    return row


def _column(levels: Sequence[float], level: float) -> int:
    for place, found in enumerate(levels):
        if math.isclose(found, level):
            return place
    raise RecordsError(f"expected quantiles at 15, 50 and 85 per cent, got {list(levels)}")


def _chosen(quantiles: Sequence[Sequence[float]], columns: Sequence[int]) -> list[list[float]]:
    return [[row[place] for place in columns] for row in quantiles]


def _typical_and_worst(ways: Sequence[Array]) -> tuple[float | None, float | None, int | None]:
    """The median over looks of the median unit; the largest median over looks of a unit, and which unit that is."""
    import numpy as np

    if not ways:
        return None, None, None
    table = np.stack(ways)  # looks x units
    table[~np.isfinite(table)] = np.nan
    by_look = [float(np.median(row[~np.isnan(row)])) for row in table if not np.isnan(row).all()]
    by_unit = {
        unit: float(np.median(way[~np.isnan(way)])) for unit, way in enumerate(table.T) if not np.isnan(way).all()
    }
    if not by_look:
        return None, None, None
    worst = max(by_unit, key=lambda unit: by_unit[unit])
    return median(by_look), by_unit[worst], worst
