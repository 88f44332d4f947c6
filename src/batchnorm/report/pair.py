"""Two runs on one page: what they differ in, what came out, and whether the difference is more than seeds make.

Two numbers with a spread are held against each other by their ranges over seeds. Ranges that overlap are called *within
seed noise*. Of n and m values from one distribution the ranges lie apart by chance with probability 2 n! m! / (n + m)!
(see :func:`chance`), which the page says: of many numbers some lie apart though nothing differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, Literal

from batchnorm._errors import OutputError, RecordsError
from batchnorm.report import behind
from batchnorm.report.figures import plot
from batchnorm.report.numbers import duration, number, plain
from batchnorm.report.page import RECORDS, Drawn, fill, flat, grid, summary_of
from batchnorm.study.document import Cell, Figure, Section, Series, Summary, Table
from batchnorm.study.records import write_whole

PAIR_PAGE = "comparison.html"
Judgement = Literal["the same", "within seed noise", "apart", "no spread"]
_JUDGEMENTS: tuple[Judgement, ...] = ("apart", "within seed noise", "the same", "no spread")
# Rows of a section's table of numbers that lie apart.
_SHOWN = 20


@dataclass(frozen=True)
class Run:
    """A run with the name that the page has for it."""

    label: str
    summary: Summary
    folder: Path | None = None


@dataclass(frozen=True)
class Value:
    """A number of both runs: ``place`` in ``series`` of a figure, each as (value, low, high).

    ``missing``: what stands for a value that is not there.
    """

    figure: str
    series: str
    place: float | str
    first: tuple[float | None, float | None, float | None]
    second: tuple[float | None, float | None, float | None]
    missing: str = "never"

    @property
    def judgement(self) -> Judgement:
        """Whether the ranges over seeds lie apart."""
        if self.first == self.second:
            return "the same"
        (_, low, high), (_, other_low, other_high) = self.first, self.second
        if low is None or other_low is None:
            return "no spread"
        # No upper end: a seed never arrived, and the range is open.
        above = high is not None and other_low > high
        below = other_high is not None and low > other_high
        return "apart" if above or below else "within seed noise"


def write_pair_page(first: Path, second: Path, out: Path | None = None) -> Path:
    """Write the page that holds the runs in folders ``first`` and ``second`` against each other.

    By default as ``comparison.html`` in the second folder. No torch is needed.

    Raises:
        RecordsError: a folder is not a run, or the two have no section in common.
        MissingDependencyError: plotly, matplotlib or jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    first, second = Path(first), Path(second)
    out = second / PAIR_PAGE if out is None else Path(out)
    if out.is_dir():
        raise OutputError(f"expected a file for the page, got the folder {out}: name a file in it")
    labels = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    runs = [Run(label, summary_of(path), path) for label, path in zip(labels, (first, second), strict=True)]
    write_whole(out, render(*runs).encode())
    return out


def render(first: Run, second: Run) -> str:
    """The page as text.

    Raises:
        RecordsError: the two have no section in common.
    """
    if first.label == second.label:
        first, second = dataclasses.replace(first, label="first"), dataclasses.replace(second, label="second")
    others = {section.name: section for section in second.summary.sections}
    common = [(section, others[section.name]) for section in first.summary.sections if section.name in others]
    if not common:
        raise RecordsError(
            f"expected two runs with a section in common, got {_names(first.summary)} and {_names(second.summary)}: "
            "choose runs of the same study"
        )
    parts = [_part(index, pair, (first, second)) for index, pair in enumerate(common)]
    values = [value for part in parts for value in part["values"]]
    alone = [
        f"{section.title} ({run.label} alone)"
        for run, other in ((first, second), (second, first))
        for section in run.summary.sections
        if section.name not in {item.name for item in other.summary.sections}
    ]
    return fill(
        "pair.html.j2",
        [drawn for part in parts for drawn in part["drawn"]],
        title=f"{first.label} and {second.label}",
        runs=[_described(run) for run in (first, second)],
        parts=parts,
        alone=alone,
        headline=grid(_headline(first, second)),
        counts=_counted(values),
        noise=_noise(first.summary, second.summary),
        config=grid(
            _different("Configuration", first, second, *(dict(flat(run.summary.config)) for run in (first, second)))
        ),
        environment=grid(_different("Environment", first, second, _environment(first), _environment(second))),
    )


def chance(first: int, second: int) -> float:
    """How likely the ranges of ``first`` and ``second`` values lie apart though both have one distribution.

    ``2 / binomial(n + m, n)``: of all orders of the n + m values, those two in which one run has the least of all.
    """
    return 2 / comb(first + second, first)


def values_of(first: Figure, second: Figure) -> Iterator[Value]:
    """Every number that both figures have, of the same series at the same place."""
    others = {series.name: series for series in second.series}
    for series in first.series:
        other = others.get(series.name)
        if other is None or series.z is not None or other.z is not None:
            continue
        known = {place: at for at, place in enumerate(other.x)}
        for at, place in enumerate(series.x):
            if place in known:
                ends = _triple(series, at), _triple(other, known[place])
                yield Value(first.title, series.name, place, *ends, series.missing)


def overlaid(first: Figure, second: Figure, labels: tuple[str, str]) -> Figure:
    """Both figures as one, the second dashed or hatched; grids stand side by side."""
    pairs: list[Series] = []
    others = {series.name: series for series in second.series}
    points = {series.name for series in first.series if series.z is None} if first.kind == "heatmap" else set()
    for series in first.series:
        other = others.pop(series.name, None)
        if series.name in points:  # what lies over a grid is the data, the same in both
            pairs.append(series)
            continue
        pairs.append(dataclasses.replace(series, name=f"{series.name}, {labels[0]}"))
        if other is not None:
            pairs.append(dataclasses.replace(other, name=f"{other.name}, {labels[1]}", dash=True))
    pairs += [
        dataclasses.replace(other, name=f"{other.name}, {labels[1]}", dash=True)
        for name, other in others.items()
        if name not in points and (first.kind != "heatmap" or other.z is not None)
    ]
    ends = [item.y_range for item in (first, second)]
    span = None if ends[0] is None or ends[1] is None else (min(e[0] for e in ends if e), max(e[1] for e in ends if e))
    return dataclasses.replace(
        first,
        series=tuple(pairs),
        y_range=span,
        alt=f"{labels[0]}: {first.alt} {labels[1]}: {second.alt}",
        caption=f"{first.caption} {labels[1]} is dashed or hatched.".strip()
        if first.kind != "heatmap"
        else first.caption,
    )


def _part(index: int, pair: tuple[Section, Section], runs: tuple[Run, Run]) -> dict[str, Any]:
    one, other = pair
    labels = (runs[0].label, runs[1].label)
    others = {figure.id: figure for figure in other.figures}
    drawn: list[Drawn] = []
    values: list[Value] = []
    for figure in one.figures:
        match = others.get(figure.id)
        if match is None or match.kind != figure.kind:
            continue
        values += values_of(figure, match)
        both = overlaid(figure, match, labels)
        drawn.append(Drawn(f"fig-{index}-{len(drawn)}", both, plot(both)))
    return {
        "id": f"part-{index}",
        "title": one.title,
        "question": one.question,
        "headlines": list(zip(labels, (one.headline, other.headline), strict=True)),
        "same": one.headline == other.headline,
        "drawn": drawn,
        "values": values,
        "counts": _counted(values),
        "table": grid(_apart(values, labels)) if any(value.judgement == "apart" for value in values) else None,
    }


def _apart(values: Sequence[Value], labels: tuple[str, str]) -> Table:
    apart = [value for value in values if value.judgement == "apart"]
    step = -(-len(apart) // _SHOWN)
    rows = tuple((item.figure, item.series, _place(item.place), *_said(item)) for item in apart)
    note = f"Every {step}. of {len(apart)} such numbers; the data of the figures have all." if step > 1 else ""
    return Table("Numbers whose ranges over seeds lie apart", ("figure", "series", "at", *labels), rows[::step], note)


def _headline(first: Run, second: Run) -> Table:
    """The numbers that stand on top of a study's page, side by side."""
    rows: list[tuple[Cell, ...]] = []
    one, other = first.summary.speedup_90, second.summary.speedup_90
    if one is not None and other is not None:
        names = {"ratio": "times fewer steps", "baseline_steps": "steps without", "bn_steps": "steps with batch norm"}
        for key, name in names.items():
            value = Value("", name, "", _ends(one[key]), _ends(other[key]))
            rows.append((name, *_said(value), value.judgement))
    for section in first.summary.sections:
        match = next((item for item in second.summary.sections if item.name == section.name), None)
        for figure in section.figures if match is not None else ():
            twin = next((item for item in match.figures if item.id == figure.id), None) if match else None
            found = list(values_of(figure, twin)) if twin is not None and figure.kind == "bars" else []
            # Bars are what a section comes to; a curve has hundreds of numbers, which the figures compare.
            rows += [
                (
                    f"{figure.title}: {_place(item.place)}" + (f", {item.series}" if len(figure.series) > 1 else ""),
                    *_said(item),
                    item.judgement,
                )
                for item in found
            ]
    return Table("Headline figures", ("figure", first.label, second.label, "difference"), tuple(rows))


def _different(title: str, first: Run, second: Run, one: Mapping[str, str], other: Mapping[str, str]) -> Table:
    names = list(dict.fromkeys((*one, *other)))
    rows = tuple(
        (name, one.get(name, "not set"), other.get(name, "not set"))
        for name in names
        if one.get(name) != other.get(name)
    )
    return Table(f"{title}: what differs", ("name", first.label, second.label), rows)


def _described(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "title": run.summary.title,
        "command": run.summary.command,
        "duration": duration(run.summary.seconds),
        "complete": run.summary.complete,
        "records": behind.records_link(run.folder / RECORDS if run.folder else None),
    }


def _environment(run: Run) -> dict[str, str]:
    return {key: plain(value) for key, value in run.summary.environment.items()}


def _counted(values: Sequence[Value]) -> str:
    """How many of the numbers are how far apart, in words."""
    if not values:
        return ""
    found = [(sum(value.judgement == kind for value in values), kind) for kind in _JUDGEMENTS]
    words = {"apart": "apart", "within seed noise": "within seed noise", "the same": "the same"}
    said = [f"{count:,} {words.get(kind, 'without a spread to judge by')}" for count, kind in found if count]
    return f"Of {len(values):,} numbers that both have: {', '.join(said)}."


def _noise(first: Summary, second: Summary) -> str:
    counts = [summary.config.get("seeds") for summary in (first, second)]
    rule = "Within seed noise means that the ranges over seeds overlap."
    if not all(isinstance(count, int) and count > 0 for count in counts):
        return rule
    odds = chance(int(counts[0] or 1), int(counts[1] or 1))
    return (
        f"{rule} With {counts[0]} and {counts[1]} seeds the ranges lie apart by chance in {odds:.2%} of cases though "
        "nothing differs, so some of many numbers will; neighbours on a curve lie apart together."
    )


def _triple(series: Series, at: int) -> tuple[float | None, float | None, float | None]:
    return (
        series.y[at],
        None if series.low is None else series.low[at],
        None if series.high is None else series.high[at],
    )


def _ends(spread: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    return spread["median"], spread["low"], spread["high"]


def _said(value: Value) -> tuple[str, str]:
    """Both numbers with their ranges."""

    def said(middle: float | None, low: float | None, high: float | None) -> str:
        shown = value.missing if middle is None else number(middle)
        if low is None or low == high:
            return shown
        return f"{shown} [{number(low)}, {'open' if high is None else number(high)}]"

    return said(*value.first), said(*value.second)


def _place(place: float | str) -> str:
    return place if isinstance(place, str) else number(place)


def _names(summary: Summary) -> str:
    return ", ".join(section.name for section in summary.sections) or "none"
