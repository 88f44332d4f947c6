"""The page of a file of statistics: what they are, what is suspicious in them, and how they look.

Drawn from a description alone, with the looks of the study's page; no torch.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm._errors import OutputError
from batchnorm.report.figures import plot
from batchnorm.report.numbers import NOTHING, number
from batchnorm.report.page import Drawn, Grid, fill, grid
from batchnorm.study.document import Cell, Figure, Series, Table
from batchnorm.study.records import write_whole

if TYPE_CHECKING:
    from batchnorm.preprocessing.describing import Description, Spectrum

# As many features have a bar with a name; more are a line over their numbers.
_BARS = 24
_ROWS = 2000
# Beyond this the median feature is a tenth of a percent of the axis.
_ONE_SCALE = 1000


def build(about: Description, out: Path, label: str) -> Path:
    """Write the page of a description to ``out``, whole or not at all; ``label`` says where the statistics are from.

    Raises:
        MissingDependencyError: plotly or jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    if out.is_dir():
        raise OutputError(f"expected a file for the page, got the folder {out}: name a file in it")
    write_whole(out, render(about, label).encode())
    return out


def render(about: Description, label: str) -> str:
    """The page as text."""
    figures = [Drawn(f"fig-{figure.id}", figure, plot(figure)) for figure in figures_of(about)]
    facts = {
        "file": label,
        "samples": about.samples_text,
        "features": f"{about.features:,}",
        "constant features": about.listed("constant") or "none",
        "features without a value": about.listed("empty") or "none",
    }
    return fill(
        "statistics.html.j2",
        figures,
        title=about.title,
        facts={**facts, **(spectrum_facts(about.spectrum) if about.spectrum else {})},
        warnings=[finding.text for finding in about.findings if finding.severity == "warning"],
        notes=[finding.text for finding in about.findings if finding.severity == "info"],
        spectrum=[drawn for drawn in figures if drawn.figure.id in ("spectrum", "together")],
        features=[drawn for drawn in figures if drawn.figure.id not in ("spectrum", "together")],
        table=_table(about),
        long=about.features > _BARS,
    )


def figures_of(about: Description) -> list[Figure]:
    """The plots: of the spectrum, of means and deviations or of ranges."""
    found = _spectrum(about.spectrum) if about.spectrum and about.spectrum.variance else []
    columns = about.columns
    if "mean" in columns:
        found.append(_means(about))
    elif "min" in columns:
        found.append(_ranges(about))
    return found


def spectrum_facts(spectrum: Spectrum, without: str = "directions without variance") -> dict[str, str]:
    """What is said of a spectrum, by name; ``without`` is the name of the number of directions without variance."""
    facts = {
        "directions kept": f"{spectrum.kept:,} of {spectrum.rank:,} with variance",
        without: f"{spectrum.without_variance:,}" if spectrum.without_variance else "none",
        "condition number": NOTHING if spectrum.condition is None else number(spectrum.condition),
    }
    if spectrum.effective_rank is not None:
        facts["effective rank"] = f"{spectrum.effective_rank:.1f}"
    if spectrum.shrinkage:
        facts["shrinkage"] = number(spectrum.shrinkage)
    return facts


def _spectrum(spectrum: Spectrum) -> list[Figure]:
    directions = tuple(float(at + 1) for at in range(len(spectrum.variance)))
    variance = tuple(value if value > 0 else None for value in spectrum.variance)
    together, total = [], 0.0
    for ratio in spectrum.ratio:
        total += ratio
        together.append(total)
    enough = next((at + 1 for at, share in enumerate(together) if share >= 0.95), len(together))
    first = Figure(
        "spectrum",
        "lines",
        "Variance along each direction",
        "direction, by falling variance",
        "variance",
        (Series("variance", directions, variance, role="batch"),),
        "A steep end says that features are almost combinations of others.",
        f"The variance falls from {number(spectrum.variance[0])} to {number(spectrum.variance[-1])} over "
        f"{len(directions):,} directions.",
        log_y=True,
    )
    second = Figure(
        "together",
        "lines",
        "Share of the variance in the first directions",
        "directions",
        "share of the variance",
        (Series("share", directions, tuple(together), role="batch"),),
        f"{enough:,} of {len(directions):,} directions hold 95% of the variance."
        if together[-1] >= 0.95
        else f"All directions kept hold {together[-1]:.1%} of the variance.",
        f"The first {enough:,} directions hold {together[enough - 1]:.1%} of the variance.",
        y_range=(0.0, 1.02),
    )
    return [first, second]


def _means(about: Description) -> Figure:
    """Means and deviations: on one scale where they fit on one, else their sizes on a scale of factors."""
    chosen = [i for i, mean in enumerate(about.columns["mean"]) if mean is not None]
    means = tuple(about.columns["mean"][i] or 0.0 for i in chosen)
    stds = tuple(about.columns["std"][i] or 0.0 for i in chosen)
    sizes = sorted(abs(mean) + std for mean, std in zip(means, stds, strict=True) if mean or std)
    ends = f" from {number(min(means))} to {number(max(means))}" if means else ""
    places = _places(about, chosen)
    alt = f"The means of {len(chosen):,} features reach{ends}."
    if sizes and sizes[-1] > _ONE_SCALE * sizes[len(sizes) // 2]:
        return Figure(
            "sizes",
            "points" if about.features <= _BARS else "lines",
            "Sizes of means and deviations",
            "feature",
            "size",
            (
                Series("mean", places, tuple(abs(mean) or None for mean in means), role="batch"),
                Series("deviation", places, tuple(std or None for std in stds), role="control"),
            ),
            "On a scale of factors, for the features are far apart. A deviation far below its mean is lost in float32.",
            alt,
            log_y=True,
        )
    low = tuple(mean - std for mean, std in zip(means, stds, strict=True))
    high = tuple(mean + std for mean, std in zip(means, stds, strict=True))
    return Figure(
        "means",
        "bars" if about.features <= _BARS else "lines",
        "Means, and one deviation to each side",
        "feature",
        "value",
        (Series("mean", places, means, low, high, role="batch"),),
        "In the data's own units.",
        alt,
    )


def _ranges(about: Description) -> Figure:
    chosen = [i for i, low in enumerate(about.columns["min"]) if low is not None]
    low = tuple(about.columns["min"][i] or 0.0 for i in chosen)
    high = tuple(about.columns["max"][i] or 0.0 for i in chosen)
    middle = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
    ends = f" from {number(min(low))} to {number(max(high))}" if chosen else ""
    return Figure(
        "ranges",
        "points" if about.features <= _BARS else "lines",
        "Ranges, from the smallest to the largest value",
        "feature",
        "value",
        (Series("middle", _places(about, chosen), middle, low, high, role="batch"),),
        "In the data's own units.",
        f"The values of {len(chosen):,} features reach{ends}.",
    )


def _places(about: Description, chosen: list[int]) -> tuple[float | str, ...]:
    if about.features <= _BARS:
        return tuple(about.name(i) for i in chosen)
    return tuple(float(i) for i in chosen)


def _table(about: Description) -> Grid:
    names = list(about.columns)
    rows: list[tuple[Cell, ...]] = [
        (about.name(i), *(_cell(name, about.columns[name][i]) for name in names))
        for i in range(min(about.features, _ROWS))
    ]
    note = f"The first {_ROWS:,} of {about.features:,} features." if about.features > _ROWS else ""
    made = grid(Table("Every feature", ("feature", *names), tuple(rows), note))
    return dataclasses.replace(made, gaps=False)


def _cell(name: str, value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return None
    return f"{value:.1%}" if name == "missing" else int(value) if name == "count" and value == int(value) else value
