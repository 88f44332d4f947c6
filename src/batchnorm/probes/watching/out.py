"""Where records go: flat scalars, TensorBoard, files."""

from __future__ import annotations

import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchnorm._errors import InputError, OutputError, RecordsError
from batchnorm.probes.watching.sight import Sight, moments_of
from batchnorm.probes.watching.statistics import Array

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

# Which looks a writer has had from a watch, so that calling again adds what is new.
_written: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[Any, int]] = weakref.WeakKeyDictionary()


def tags(layers: Sequence[str]) -> dict[str, str]:
    """A name for each layer that all receivers take: MLflow allows letters, digits and ``_ - . /`` and spaces."""
    found: dict[str, str] = {}
    for layer in layers:
        plain = re.sub(r"[^A-Za-z0-9_\-. ]", "_", layer) or "model"
        tag, number = plain, 1
        while tag in found.values():
            number += 1
            tag = f"{plain}_{number}"
        found[layer] = tag
    return found


def scalars(layers: Sequence[str], sights: Iterable[Sight]) -> dict[str, float]:
    """``bn/<layer>/<name>``: what is not finite, or does not apply, is left out."""
    names = tags(layers)
    found: dict[str, float] = {}
    for sight in sights:
        for name, value in _numbers(sight).items():
            if np.isfinite(value):
                found[f"bn/{names[sight.kind.name]}/{name}"] = float(value)
    return found


def _numbers(sight: Sight) -> dict[str, float]:
    gap, ratio = sight.gaps()
    mean, std = moments_of(sight.input)
    output_mean, output_std = moments_of(sight.output)
    norm = sight.gradient_norm()
    numbers: dict[str, float] = {"dead": sight.dead, "saturated": sight.saturated}
    for name, values in (
        ("input_mean", mean),
        ("input_std", std),
        ("output_mean", output_mean),
        ("output_std", output_std),
        ("weight", sight.parameter("weight")),
        ("bias", sight.parameter("bias")),
        ("mean_gap", None if gap is None else np.abs(gap)),
        ("var_ratio", ratio),
    ):
        if values is not None:
            numbers[name + "_median"] = _finite(np.median, values)
    if gap is not None and ratio is not None:
        numbers["mean_gap_max"] = _finite(np.max, np.abs(gap))
        numbers["var_ratio_min"], numbers["var_ratio_max"] = _finite(np.min, ratio), _finite(np.max, ratio)
    if norm is not None:
        numbers["grad_norm"] = float(np.sqrt(np.sum(norm**2)))
    typical = sight.typical()
    if typical is not None:
        numbers.update(zip(("p15", "p50", "p85"), typical, strict=True))  # type: ignore[arg-type]
    if mean is not None and sight.input is not None and sight.input.count:
        numbers["nonfinite"] = float((~np.isfinite(mean)).mean())
    return numbers


def _finite(statistic: Any, values: Array) -> float:
    """A statistic of the units whose value is finite; NaN where there is none."""
    values = values[np.isfinite(values)]
    return float(statistic(values)) if len(values) else float("nan")


def to_tensorboard(watch: Any, writer: SummaryWriter, looks: Iterable[tuple[int, list[Sight]]]) -> None:
    """Scalars as :func:`scalars` names them, and histograms over units: ``bn/<layer>/input`` of all percentiles."""
    if not hasattr(writer, "add_scalar"):
        raise InputError(f"expected a SummaryWriter of torch.utils.tensorboard, got {writer!r}")
    before = _written.setdefault(writer, weakref.WeakKeyDictionary())
    last = before.get(watch, -1)
    names = tags(watch.layers)
    for number, sights in looks:
        if number <= last:
            continue
        before[watch] = number
        for sight in sights:
            for tag, value in scalars(watch.layers, [sight]).items():
                writer.add_scalar(tag, value, sight.step)
            gap, ratio = sight.gaps()
            for name, values in (
                # The percentiles between the outermost are 5% apart: each stands for as much of the values.
                ("input", None if sight.quantiles is None else sight.quantiles[:, 1:-1]),
                ("weight", sight.parameter("weight")),
                ("bias", sight.parameter("bias")),
                ("mean_gap", gap),
                ("var_ratio", ratio),
                ("grad_norm", sight.gradient_norm()),
            ):
                finite = values[np.isfinite(values)] if values is not None else ()
                if len(finite):
                    writer.add_histogram(f"bn/{names[sight.kind.name]}/{name}", finite, sight.step)


def save(records: Iterable[dict[str, Any]], path: str | Path) -> None:
    """JSON lines, written beside ``path`` and renamed when whole."""
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8", delete=False
        ) as file:
            try:
                for record in records:
                    file.write(json.dumps(record, allow_nan=False) + "\n")
                file.close()
                os.replace(file.name, path)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def load_records(path: str | Path) -> list[dict[str, Any]]:
    """The records that :meth:`Watch.save` wrote.

    Raises:
        RecordsError: the file cannot be read, or a line is no record.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"cannot read records from {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordsError(f"expected a record in line {number} of {path}, got no JSON: {error.msg}") from error
        if not isinstance(record, dict) or not {"layer", "step"} <= record.keys():
            raise RecordsError(f"expected a record with layer and step in line {number} of {path}, got {line[:40]!r}")
        records.append(record)
    return records
