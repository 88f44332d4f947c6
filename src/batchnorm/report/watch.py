"""The page of a watch: how the layers of a model fare while it trains. Drawn from records alone: no model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchnorm._errors import OutputError
from batchnorm.report.figures import plot
from batchnorm.report.looks import Layer, Record, layers_of, percent
from batchnorm.report.numbers import number
from batchnorm.report.page import Drawn, fill, grid
from batchnorm.report.watch_chapters import Chapter, chapters
from batchnorm.report.watch_figures import DRAWN, SKIP, chosen
from batchnorm.study.records import write_whole


def write_watch_page(records: Iterable[Record], path: str | Path, title: str = "Watch") -> Path:
    """Write the page of a watch's records, whole or not at all.

    Each layer's input, how fast it moves, running against batch statistics, dead and saturated units, gradients, gamma
    and beta, over the steps; of more than six layers those that are worst by one of these measures, and all in tables.

    Args:
        records: of :attr:`Watch.records`, or as they were saved.
        path: the file; its folder must exist.
        title: what stands on top.

    Returns:
        The path.

    Raises:
        RecordsError: there are no records, or they are none of a watch.
        MissingDependencyError: plotly or jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"expected a file for the page, got the folder {path}: name a file in it")
    write_whole(path, render(records, title).encode())
    return path


def render(records: Iterable[Record], title: str = "Watch") -> str:
    """The page as text."""
    from batchnorm.probes.shift import KEYS, shift

    records = list(records)
    layers = layers_of(records)
    whole = [record for record in records if all(key in record for key in KEYS)]
    modes = {layer.name: layer.mode for layer in layers}
    skip = _skip(layers)
    moved = {row["layer"]: row for row in shift(whole, skip) if row["mode"] == modes[row["layer"]]}
    of = chosen(layers, moved, skip)
    parts = [_drawn(chapter) for chapter in chapters(of)]
    return fill(
        "watch.html.j2",
        [drawn for part in parts for row in part["rows"] for drawn in row],
        title=title,
        facts=_facts(records, layers),
        broken=_broken(layers),
        notable=list(_notable(layers, moved)),
        drawn=f"{DRAWN} of {len(layers)} layers are drawn, each the worst by some measure at the last look; the tables "
        "hold all."
        if of.some
        else "",
        parts=parts,
    )


def _skip(layers: Sequence[Layer]) -> int:
    """The first steps are left out of the movement, unless there is nothing else."""
    steps = [look.step for layer in layers for look in layer.looks]
    return SKIP if max(steps) - SKIP > SKIP else min(steps)


def _drawn(chapter: Chapter) -> dict[str, Any]:
    return {
        "id": chapter.id,
        "title": chapter.title,
        "text": chapter.text,
        "rows": [[Drawn(f"fig-{figure.id}", figure, plot(figure)) for figure in row] for row in chapter.rows],
        "tables": [grid(table) for table in chapter.tables],
        "folded": chapter.folded,
    }


def _facts(records: Sequence[Record], layers: Sequence[Layer]) -> dict[str, str]:
    steps = {look.step for layer in layers for look in layer.looks}
    counts = sorted({int(record["count"]) for record in records if record.get("count")})
    modes = {record["mode"] for record in records}
    looks = f"{len(steps):,}, from step {min(steps):,} to {max(steps):,}"
    if modes == {"train", "eval"}:
        looks += ", in training; those in evaluation are not drawn"
    elif modes == {"eval"}:
        looks += ", in evaluation"
    facts = {"layers": f"{len(layers):,}", "looks": looks}
    if counts:
        ends = number(counts[0]) if len(counts) == 1 else f"{number(counts[0])} to {number(counts[-1])}"
        facts["values of a channel in a batch"] = ends
    if len(steps) > 1:
        facts["numbers below"] = f"of the last look, step {max(steps):,}; movement of all"
    return facts


def _broken(layers: Sequence[Layer]) -> list[str]:
    """Where NaN and infinite values were first seen."""
    found = [(look.step, at, layer) for at, layer in enumerate(layers) for look in layer.looks if not look.finite]
    if not found:
        return []
    step, _, layer = min(found, key=lambda item: item[:2])
    which = {layer.name for _, _, layer in found}
    return [
        f"NaN or infinite input, first seen at step {step:,} in {layer.said}; in {len(which):,} of {len(layers):,} "
        "layers altogether."
    ]


def _notable(layers: Sequence[Layer], moved: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The worst layer by each measure, in words."""
    gaps = [(layer.last.gap, layer) for layer in layers if layer.last.gap is not None]
    if gaps:
        gap, layer = max(gaps, key=lambda item: item[0])
        yield f"Largest mean gap: {number(gap)} running deviations, channel {layer.last.gap_channel} of {layer.said}."
    spreads = [(layer.last.spread, layer) for layer in layers if layer.last.spread is not None]
    if spreads:
        _, layer = max(spreads, key=lambda item: item[0])
        yield f"Variance furthest off: {number(layer.last.furthest or 0.0)} times the running one, in {layer.said}."
    for name, what in (("dead", "Most dead units"), ("saturated", "Most saturated values")):
        share, layer = max(((getattr(layer.last, name) or 0.0, layer) for layer in layers), key=lambda item: item[0])
        if share > 0.0:
            yield f"{what}: {percent(share)} in {layer.said}."
    rows = [row for row in moved.values() if row.get("wasserstein_std") is not None]
    if rows:
        fastest = max(rows, key=lambda row: row["wasserstein_std"])
        name = f"layer {fastest['layer']}" if fastest["layer"] else "the model"
        yield (
            f"Fastest input: {number(fastest['wasserstein_std'])} std per 100 steps in {name}, where chance alone "
            f"gives {number(fastest['wasserstein_std_chance'])}."
        )
    norms = [(layer.last.gradient, layer) for layer in layers if layer.last.gradient]
    if len(norms) > 1:
        (least, low_layer), (most, high_layer) = (end(norms, key=lambda item: item[0]) for end in (min, max))
        yield f"Gradient norms: from {number(least)} ({low_layer.said}) to {number(most)} ({high_layer.said})."
