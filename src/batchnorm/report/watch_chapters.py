"""The sections of a watch's page, one for each question: its figures and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from batchnorm.report.looks import Look, percent
from batchnorm.report.numbers import number
from batchnorm.report.watch_figures import ROLES, SKIP, Chosen, by_depth, lines, thinned
from batchnorm.study.document import Cell, Figure, Series, Table

_BARS = 12


@dataclass(frozen=True)
class Chapter:
    """One question of the page; figures of one row stand side by side, tables that are ``folded`` open on demand."""

    id: str
    title: str
    text: str
    rows: tuple[tuple[Figure, ...], ...] = ()
    tables: tuple[Table, ...] = ()
    folded: bool = False


def chapters(of: Chosen) -> Iterator[Chapter]:
    """The page's sections, without those of which nothing was recorded."""
    for make in (_inputs, _movement, _statistics, _units, _gradients, _parameters, _table):
        chapter = make(of)
        if chapter is not None:
            yield chapter


def _inputs(of: Chosen) -> Chapter | None:
    figures: list[Figure] = []
    for layer, role in zip(of.drawn, ROLES, strict=False):
        looks = [look for look in thinned(layer.looks) if look.typical is not None]
        if not looks:
            continue
        low, middle, high = (tuple(look.typical[at] for look in looks if look.typical) for at in range(3))
        steps = tuple(float(look.step) for look in looks)
        figures.append(
            Figure(
                f"input-{len(figures)}",
                "lines",
                layer.title,
                "step",
                "input",
                (Series("median, 15% to 85%", steps, middle, low, high, role=role),),
                f"{layer.type}, {layer.channels:,} channels" if layer.channels else layer.type,
                f"The median of the typical unit's input goes from {number(middle[0])} to {number(middle[-1])}, "
                f"the way from its 15th to its 85th percentile from {number(high[0] - low[0])} to "
                f"{number(high[-1] - low[-1])}.",
            )
        )
    if not figures:
        return None
    text = "Percentiles 15, 50 and 85 of each layer's input, in its typical unit (at each level the median over units)."
    return Chapter("inputs", "Inputs", text, (tuple(figures),))


def _movement(of: Chosen) -> Chapter | None:
    rows = {layer.title: of.moved.get(layer.name, {}) for layer in of.layers}
    known = {name: row for name, row in rows.items() if row.get("wasserstein_std") is not None}
    if not known:
        return None
    worst = dict(sorted(known.items(), key=lambda item: -item[1]["wasserstein_std"])[:_BARS])
    names = tuple(worst)
    found, nothing = (
        tuple(row[key] for row in worst.values()) for key in ("wasserstein_std", "wasserstein_std_chance")
    )
    first = next(iter(worst.values()))
    which = f"The {len(names)} fastest of {len(known)} layers. " if len(names) < len(known) else ""
    figure = Figure(
        "movement",
        "bars",
        "How fast the typical unit's input moves",
        "layer",
        "std per 100 steps",
        (
            Series("1-Wasserstein distance", names, found, role="batch"),
            Series("by chance alone", names, nothing, role="other"),
        ),
        f"{which}The way between looks {number(first['every'])} steps apart; what chance gives from batch to batch is "
        "computed for independent values.",
        f"The fastest is {names[0]} with {number(found[0])} std per 100 steps, by chance {number(nothing[0])}.",
    )
    columns = "Layer, W1, By chance, Percentiles, Worst unit, Unit, W1 absolute, Worst absolute"
    keys = ["wasserstein_std", "wasserstein_std_chance", "percentiles_std", "wasserstein_std_worst", "wasserstein_unit"]
    keys += ["wasserstein_absolute", "wasserstein_absolute_worst"]
    cells = tuple((name, *(_three(row.get(key)) for key in keys)) for name, row in rows.items())
    note = (
        "W1 is the 1-Wasserstein distance, of the typical unit and of the worst, in units of the unit's std at the "
        "earlier look, and absolute; percentiles are the mean way of the 15th, 50th and 85th."
    )
    table = Table("Movement per 100 steps", tuple(columns.split(", ")), cells, note)
    text = f"The first {of.skip} steps are left out: next to no spread makes every movement huge in units of std."
    if of.skip < SKIP:
        text = "So short a run has its first steps counted too: next to no spread makes movement huge in units of std."
    drawn = ((figure,),) if len(known) > 1 else ()
    return Chapter("movement", "Movement", text, drawn, (table,), folded=len(rows) > _BARS)


def _statistics(of: Chosen) -> Chapter | None:
    gap = lines(
        of,
        "gap",
        "Means: the channel furthest off",
        "running deviations",
        lambda look: look.gap,
        "|batch mean - running mean| over the running deviation, in the layer's worst channel.",
        log_y=True,
    )
    ratio = lines(
        of,
        "ratio",
        "Variances: the channel furthest off",
        "times",
        lambda look: look.factor,
        "How many times the running variance the batch's is, or the other way round, in the layer's worst channel.",
        log_y=True,
    )
    figures = tuple(figure for figure in (gap, ratio) if figure)
    if not figures:
        return None
    depth = by_depth(of, "gap-depth", "Means of all layers", "log10 of the largest gap", lambda look: look.gap)
    text = (
        "What evaluation will use against what training sees. Gaps shrink to sampling noise where the running "
        "statistics keep up; a gap that stays near 1 is a model that computes something else in evaluation."
    )
    return Chapter("statistics", "Running against batch statistics", text, (figures, *depth))


def _units(of: Chosen) -> Chapter | None:
    if all(layer.last.dead is None and layer.last.saturated is None for layer in of.layers):
        return None
    figures: list[Figure] = []
    for name, caption in (
        ("dead", "Units whose output is the same whatever the input."),
        ("saturated", "Values on a flat end of the activation, where hardly any gradient passes."),
    ):
        if any(getattr(look, name) for layer in of.drawn for look in layer.looks):
            found = lines(of, name, name.capitalize(), "share", attrgetter(name), caption)
            figures += [found] if found else []
    text = "No dead unit and no saturated value in any look at the layers drawn."
    if figures:
        text = "Units that take no part: the share of each layer's."
    return Chapter("units", "Dead and saturated", text, (tuple(figures),) if figures else ())


def _gradients(of: Chosen) -> Chapter | None:
    figure = lines(
        of,
        "gradient",
        "Norm of the gradient",
        "norm",
        lambda look: look.gradient,
        "With respect to the layer's output, over all units looked at.",
        log_y=True,
    )
    if figure is None:
        return None
    depth = by_depth(of, "gradient-depth", "All layers", "log10 of the norm", lambda look: look.gradient)
    text = "Where the norm shrinks or grows by orders of magnitude from layer to layer, it vanishes or explodes."
    return Chapter("gradients", "Gradients", text, ((figure,), *depth))


def _parameters(of: Chosen) -> Chapter | None:
    bands = len(of.drawn) <= 2
    caption = "Median over channels, and percentiles 15 to 85." if bands else "Median over channels."
    figures = [
        lines(of, name, name.capitalize(), name, _middle(key), caption, ends=attrgetter(key) if bands else None)
        for key, name in (("weight", "gamma"), ("bias", "beta"))
    ]
    found = tuple(figure for figure in figures if figure is not None)
    if not found:
        return None
    text = "What the layers learned: y = gamma x_hat + beta, channel by channel."
    return Chapter("parameters", "Gamma and beta", text, (found,))


def _middle(key: str) -> Callable[[Look], float | None]:
    def middle(look: Look) -> float | None:
        triple = getattr(look, key)
        return None if triple is None else float(triple[1])

    return middle


def _table(of: Chosen) -> Chapter:
    rows: list[tuple[Cell, ...]] = []
    for layer in sorted(of.layers, key=lambda layer: -layer.last.severity):
        last = layer.last
        low, high = last.ratio or (None, None)
        rows.append(
            (
                layer.title,
                layer.type,
                layer.channels,
                _three(last.gap),
                last.gap_channel,
                _three(low),
                _three(high),
                _percent(last.dead),
                _percent(last.saturated),
                _three(last.gradient),
                _three(of.moved.get(layer.name, {}).get("wasserstein_std")),
                "yes" if last.finite else "no",
            )
        )
    columns = "Layer, Type, Channels, Mean gap, In channel, Least variance ratio, Largest, Dead, Saturated, Gradient, "
    columns += "Movement, All finite"
    note = (
        "At the last look, the worst first: by mean gap in running deviations, |log| of the variance ratio, dead and "
        "saturated shares, whichever is largest. Movement is W1 in std per 100 steps."
    )
    table = Table("Layers, the worst first", tuple(columns.split(", ")), tuple(rows), note)
    return Chapter("layers", "Every layer", "", (), (table,))


def _three(value: Any) -> Cell:
    """Three digits; None where there is none."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _percent(share: float | None) -> Cell:
    return None if share is None else percent(share)
