"""The page: one HTML file that opens from disk, with its plots, their library and its looks inside."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm._errors import BatchnormError, ConfigError, MissingDependencyError, OutputError
from batchnorm.report import behind, palette
from batchnorm.report.figures import Plot, peers, plot
from batchnorm.report.headline import headline
from batchnorm.report.numbers import column, duration, is_numeric, plain
from batchnorm.report.stills import still
from batchnorm.study.document import Cell, Figure, Section, Summary, Table
from batchnorm.study.records import write_whole

PAGE = "report.html"
RECORDS = "records.jsonl"
# Cells up to this many characters are not broken over lines.
_BRIEF = 20


@dataclass(frozen=True)
class Grid:
    """A table as text; ``styles`` has a class for each column (numbers flush right), ``gaps`` tells of empty cells,
    ``csv`` is a link to the numbers themselves."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    styles: tuple[str, ...]
    note: str
    gaps: bool
    csv: str = ""


@dataclass(frozen=True)
class Drawn:
    """A figure with its plot, and the name that links to it."""

    id: str
    figure: Figure
    plot: Plot


@dataclass(frozen=True)
class Part:
    """A section with its plots, row by row, and its tables."""

    id: str
    section: Section
    rows: tuple[tuple[Drawn, ...], ...]
    tables: tuple[Grid, ...]


def build(summary: Summary, out: Path, records: Path | None = None) -> Path:
    """Write the page of ``summary`` to ``out`` and return its path.

    ``out`` is a file; its folder must exist. The page is written beside it and renamed over it when whole. ``records``
    is the file of the run's records, which the page offers as CSV; by default the one that lies beside ``out``.

    Raises:
        MissingDependencyError: plotly, matplotlib or jinja2 is not installed.
        RecordsError: the records are damaged.
        OutputError: the file cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise OutputError(f"expected a file for the page, got the folder {out}: name a file in it, e.g. {out / PAGE}")
    write_whole(out, render(summary, out.with_name(RECORDS) if records is None else records).encode())
    return out


def rebuild(run_folder: Path, out: Path | None = None) -> Path:
    """Build the page of a run from its records, by default as ``report.html`` in its folder.

    torch is not needed, nor the summary that the run wrote: the records say it all.

    Raises:
        RecordsError: ``run_folder`` is not a run, or its records are damaged.
        MissingDependencyError, OutputError: as :func:`build`.
    """
    run_folder = Path(run_folder)
    return build(summary_of(run_folder), run_folder / PAGE if out is None else out, run_folder / RECORDS)


def summary_of(run_folder: Path) -> Summary:
    """The document of a run from its records; where another version wrote the configuration, as it was saved.

    Raises:
        RecordsError: ``run_folder`` is not a run, or its records are damaged.
        ConfigError: its configuration cannot be read, and no document of it was saved.
    """
    from batchnorm.study import load_summary, summarise

    try:
        saved = load_summary(run_folder)
    except BatchnormError:
        # An interrupted study has written none.
        saved = None
    try:
        return summarise(run_folder, command=saved.command if saved else saved_command(run_folder))
    except ConfigError:
        if saved is None:
            raise
        return saved


def saved_command(run_folder: Path) -> str:
    """A command that repeats the study in ``run_folder``, by its saved configuration."""
    return shlex.join(["batchnorm", "study", "--config", str(run_folder / "config.toml")])


def render(summary: Summary, records: Path | None = None) -> str:
    """The page of ``summary`` as text, with the records of the file ``records`` to download.

    Raises:
        MissingDependencyError: plotly, matplotlib or jinja2 is not installed.
        RecordsError: the records are damaged.
    """
    parts = parts_of(summary.sections)
    top = headline(summary)
    return fill(
        "page.html.j2",
        [drawn for part in parts for row in part.rows for drawn in row],
        summary=summary,
        headline=top,
        headline_id=next((part.id for part in parts if top and part.section is top.section), None),
        overview=grid(summary.overview),
        parts=parts,
        environment=[(key, plain(value)) for key, value in summary.environment.items()],
        config=list(flat(summary.config)),
        duration=duration(summary.seconds),
        plain=plain,
        records=behind.records_link(records),
    )


def fill(template: str, figures: Sequence[Drawn], **values: Any) -> str:
    """A page of ``template`` with ``values``, the plots of ``figures``, and what every page has inside.

    Raises:
        MissingDependencyError: plotly, matplotlib or jinja2 is not installed.
    """
    environment = _environment()
    return str(
        environment.get_template(template).render(
            **values,
            plots={
                f"{drawn.id}-{index}": {"data": panel.data, "layout": panel.layout, "flipped": drawn.plot.flipped}
                for drawn in figures
                for index, panel in enumerate(drawn.plot.panels)
            },
            themes=[(dark, palette.variables(dark)) for dark in (False, True)],
            style=_raw(environment, "page.css"),
            script=_raw(environment, "page.js"),
            plotly=_plotly(),
        )
    )


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "the report's page needs jinja2, which is not installed: pip install 'batchnorm[report]'"
        ) from error
    # Every string is escaped; only the page's own style and script and plotly's are put in as they are.
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(still=_still, data=_data, csv=_csv)
    return made


def _still(drawn: Drawn) -> Any:
    import markupsafe

    # matplotlib has escaped what the figure says.
    return markupsafe.Markup(still(drawn.plot.figure, drawn.plot.keys, drawn.plot.flipped, drawn.id))


def _data(drawn: Drawn) -> list[Grid]:
    return [dataclasses.replace(grid(table), csv="") for table in behind.tables(drawn.figure)]


def _csv(drawn: Drawn) -> str:
    return behind.link(*behind.rows(drawn.figure))


def _raw(environment: Any, name: str) -> Any:
    import markupsafe

    text, _, _ = environment.loader.get_source(environment, name)
    return markupsafe.Markup(text)


def _plotly() -> str:
    """plotly's library, packed to a third. The page's script unpacks it; where it cannot, stills stand in."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependencyError(
            "the report's page needs plotly, which is not installed: pip install 'batchnorm[report]'"
        ) from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()


def parts_of(sections: Sequence[Section]) -> list[Part]:
    """The sections with their plots and tables, each with an anchor of its own."""
    taken: set[str] = {"top", "overview", "environment"}
    parts = []
    for section in sections:
        rows = tuple(
            tuple(Drawn(_anchor(f"fig-{item.id}", taken), item, plot(item, group)) for item in group)
            for group in peers(section.figures)
        )
        tables = tuple(grid(item) for item in section.tables)
        parts.append(Part(_anchor(section.name, taken), section, rows, tables))
    return parts


def grid(table: Table) -> Grid:
    """A table of the document as the page shows it."""
    columns = list(zip(*table.rows, strict=True)) if table.rows else [() for _ in table.columns]
    texts = [column(cells) for cells in columns]
    return Grid(
        title=table.title,
        columns=table.columns,
        rows=tuple(zip(*texts, strict=True)),
        # The first column names the row, whatever it holds.
        styles=("", *(_style(cells, shown) for cells, shown in zip(columns[1:], texts[1:], strict=True))),
        note=table.note,
        gaps=any(cell is None for row in table.rows for cell in row),
        csv=behind.link(table.columns, table.rows),
    )


def _style(cells: Sequence[Cell], texts: Sequence[str]) -> str:
    if is_numeric(cells):
        return "number"
    return "brief" if all(len(text) <= _BRIEF for text in texts) else ""


def _anchor(name: str, taken: set[str]) -> str:
    """A name for links: lower case, no space, no second of its kind."""
    base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "part"
    anchor = base
    count = 1
    while anchor in taken:
        count += 1
        anchor = f"{base}-{count}"
    taken.add(anchor)
    return anchor


def flat(config: Any, prefix: str = "") -> Any:
    """Names and values of a configuration as text: ``headline.lrs``, ``0.3, 1, 2``."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            is_list = isinstance(value, list | tuple)
            yield f"{prefix}{key}", ", ".join(plain(item) for item in value) if is_list else plain(value)
