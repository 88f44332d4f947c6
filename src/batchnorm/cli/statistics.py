"""How statistics look in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from batchnorm.report.numbers import NOTHING, number
from batchnorm.report.statistics import spectrum_facts
from batchnorm.report.terminal import console_for, simple_table

if TYPE_CHECKING:
    from batchnorm.preprocessing.describing import Description, Spectrum

FEW = 20
_BAR = 24
_PARTS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"


def facts(stream: TextIO, lines: Mapping[str, str]) -> None:
    """Names and values, one below the other."""
    console_for(stream).print(fact_lines(lines), soft_wrap=True)


def fact_lines(lines: Mapping[str, str]) -> Text:
    """The same, as part of a screen."""
    width = max(map(len, lines))
    words = [Text.assemble((name.ljust(width), "dim"), "  ", text) for name, text in lines.items()]
    return Text("\n").join(words)


def screen(about: Description, path: str, every: bool) -> RenderableType:
    """All that is to be seen of a file of statistics."""
    lines = {"file": path, "learned": about.title, "samples": about.samples_text, "features": f"{about.features:,}"}
    parts: list[RenderableType] = [fact_lines(lines)]
    if about.findings:
        parts += [Text("\nWorth a look", "bold"), _findings(about)]
    if about.spectrum is not None:
        parts += [Text("\nSpectrum", "bold"), *_spectrum(about.spectrum, every)]
    parts += [Text("\nFeatures", "bold"), *_features(about, every)]
    return Group(*parts)


def _findings(about: Description) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in about.findings:
        mark = Text("!", "bold yellow") if finding.severity == "warning" else Text("\u00b7", "dim")
        table.add_row(mark, Text(finding.text))
    return table


def _spectrum(spectrum: Spectrum, every: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [fact_lines(spectrum_facts(spectrum, "without variance"))]
    if not spectrum.variance:
        return parts
    table = simple_table(
        ("direction", "variance", "share", "together", ""), numeric=("direction", "variance", "share", "together")
    )
    shown = range(len(spectrum.variance)) if every else _some(len(spectrum.variance), FEW // 2)
    together = 0.0
    sums = []
    for ratio in spectrum.ratio:
        together += ratio
        sums.append(together)
    last = -1
    for index in shown:
        if index != last + 1:
            table.add_row("\u2026")
        last = index
        ratio = spectrum.ratio[index]
        table.add_row(
            str(index + 1),
            number(spectrum.variance[index]),
            _percent(ratio),
            _percent(sums[index]),
            Text(_bar(ratio / max(spectrum.ratio[0], 1e-300)), "blue"),
        )
    return [*parts, table]


def _some(count: int, most: int) -> list[int]:
    """The first numbers, and the last two, below ``count``."""
    return list(range(count)) if count <= most else [*range(most - 2), count - 2, count - 1]


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return _PARTS[-1] * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")


def _features(about: Description, every: bool) -> list[RenderableType]:
    names = [name for name in about.columns if name != "missing" or any(about.columns["missing"])]
    heads = ("feature", *names, "")
    table = simple_table(heads, numeric=[*names, *(["feature"] if about.names is None else [])])
    notes = _notes(about)
    # What is worth a look comes first, the rest in the order of the data.
    order = sorted(range(about.features), key=lambda i: (i not in notes, i))
    shown = order if every else order[:FEW]
    for i in shown:
        cells = [_cell(name, about.columns[name][i]) for name in names]
        table.add_row(Text(about.name(i)), *cells, Text(", ".join(notes.get(i, ())), "yellow"))
    if len(shown) == len(order):
        return [table]
    return [table, Text(f"{len(order) - len(shown):,} features more: --all shows them", "dim")]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    return _percent(value) if name == "missing" else number(value)


def _percent(share: float) -> str:
    return "< 0.1%" if 0 < share < 5e-4 else f"{share:.1%}"


def _notes(about: Description) -> dict[int, list[str]]:
    words = {"empty": "no value", "constant": "constant", "missing": "mostly missing", "offset": "tiny deviation"}
    words |= {"rank": "dependent", "scales": "scale"}
    notes: dict[int, list[str]] = {}
    for finding in about.findings:
        for i in finding.features:
            notes.setdefault(i, []).append(words[finding.kind])
    return notes
