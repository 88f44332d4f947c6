"""Lines and grids of a watch's layers over the steps, and which layers are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from batchnorm.report.looks import Layer, Look
from batchnorm.report.numbers import number
from batchnorm.study.document import Figure, Series

Role = Literal["none", "batch", "control", "other", "data-a", "data-b"]
# A layer has one colour on the whole page; more layers than colours are not drawn.
ROLES: tuple[Role, ...] = ("batch", "none", "control", "data-a", "data-b", "other")
DRAWN = len(ROLES)
SKIP = 100
_POINTS = 400


@dataclass(frozen=True)
class Chosen:
    """All layers in the model's order, those that are drawn (the worst first), and how far each moved."""

    layers: Sequence[Layer]
    drawn: Sequence[Layer]
    moved: Mapping[str, Mapping[str, Any]]
    skip: int

    @property
    def some(self) -> bool:
        """Whether there are layers that are not drawn."""
        return len(self.drawn) < len(self.layers)


def chosen(layers: Sequence[Layer], moved: Mapping[str, Mapping[str, Any]], skip: int) -> Chosen:
    """Draw all layers where colours suffice, else the worst by each measure in turn."""
    norms = sorted(layer.last.gradient for layer in layers if layer.last.gradient)
    usual = norms[len(norms) // 2] if norms else 1.0
    measures: tuple[Callable[[Layer], float | None], ...] = (
        lambda layer: None if layer.last.finite else math.inf,
        lambda layer: layer.last.gap,
        lambda layer: layer.last.spread,
        lambda layer: layer.last.dead,
        lambda layer: layer.last.saturated,
        lambda layer: moved.get(layer.name, {}).get("wasserstein_std"),
        lambda layer: abs(math.log(layer.last.gradient / usual)) if layer.last.gradient else None,
    )
    ranked = [
        sorted((layer for layer in layers if measure(layer)), key=lambda layer: -(measure(layer) or 0.0))
        for measure in measures
    ]
    names: dict[str, Layer] = {}
    for place in range(len(layers)):
        for order in ranked:
            if place < len(order) and len(names) < DRAWN:
                names.setdefault(order[place].name, order[place])
    for layer in layers:
        if len(names) < DRAWN:
            names.setdefault(layer.name, layer)
    drawn = sorted(names.values(), key=lambda layer: -layer.last.severity)
    return Chosen(layers, drawn, moved, skip)


def lines(
    of: Chosen,
    name: str,
    title: str,
    label: str,
    value: Callable[[Look], float | None],
    caption: str,
    log_y: bool = False,
    ends: Callable[[Look], Any] | None = None,
) -> Figure | None:
    """A line for each layer drawn, in its colour; None where none has a value."""
    series = []
    said = []
    for layer, role in zip(of.drawn, ROLES, strict=False):
        looks = thinned(layer.looks)
        values = tuple(_drawable(value(look), log_y) for look in looks)
        known = [found for found in values if found is not None]
        if not known:
            continue
        said.append(f"{layer.title} {number(known[-1])}")
        steps = tuple(float(look.step) for look in looks)
        low, high = None, None
        if ends is not None:
            band = [ends(look) for look in looks]
            low, high = (tuple(None if item is None else item[at] for item in band) for at in (0, 2))
        series.append(Series(layer.title, steps, values, low, high, role=role))
    if not series:
        return None
    alt = f"At the last look: {', '.join(said)}."
    return Figure(name, "lines", title, "step", label, tuple(series), caption, alt, log_y=log_y)


def by_depth(
    of: Chosen, name: str, title: str, label: str, value: Callable[[Look], float | None]
) -> tuple[tuple[Figure, ...], ...]:
    """A row with a grid of layers by steps, where there are more layers than lines."""
    if not of.some:
        return ()
    layers = [layer for layer in of.layers if any(value(look) for look in layer.looks)]
    kept = [{look.step: value(look) for look in layer.looks if value(look)} for layer in layers]
    steps = sorted(set.intersection(*(set(found) for found in kept))) if kept else []
    if len(layers) < 2 or len(steps) < 2:
        return ()
    steps = steps[:: max(1, len(steps) // 100)]
    rows = tuple(tuple(math.log10(found[step] or 1.0) for step in steps) for found in kept)
    depth = tuple(float(of.layers.index(layer) + 1) for layer in layers)
    figure = Figure(
        name,
        "heatmap",
        title,
        "step",
        "layer, in the model's order",
        (Series(label, tuple(map(float, steps)), depth, z=rows, role="batch"),),
        f"{label[0].upper()}{label[1:]}, layer by layer: 1 is {layers[0].title}, {len(of.layers)} {layers[-1].title}.",
        f"{label} of {len(layers)} layers over {len(steps)} looks, from {number(min(map(min, rows)))} to "
        f"{number(max(map(max, rows)))}.",
    )
    return ((figure,),)


def thinned(looks: Sequence[Look]) -> Sequence[Look]:
    """Evenly, where there are more than a plot has pixels for."""
    return looks[:: math.ceil(len(looks) / _POINTS)]


def _drawable(value: float | None, log_y: bool) -> float | None:
    return None if value is None or not math.isfinite(value) or (log_y and value <= 0.0) else value
