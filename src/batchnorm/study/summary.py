"""From the records to the document, without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from batchnorm.study import records as records_module
from batchnorm.study import sections
from batchnorm.study.comparison import Comparison, settings
from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Section, Summary, Table
from batchnorm.study.folder import RunFolder
from batchnorm.study.records import FINISHED, Records
from batchnorm.study.sections import headline_page

TITLE = "What batch normalization does to a network"


def load_summary(out: str | Path) -> Summary:
    """The document of the study in folder ``out``, as it was written.

    Raises:
        RecordsError: there is none, or it is not a summary of this version.
    """
    return RunFolder(Path(out)).read_summary()


def summarise(out: str | Path, *, command: str = "") -> Summary:
    """Make the document of the study, or comparison, in folder ``out`` from its records; needs no torch.

    A study that is not finished gives what its finished runs can say, with ``complete=False``.

    Raises:
        RecordsError: there is no study, or its records are damaged.
        ConfigError: its configuration cannot be read.
    """
    folder = RunFolder(Path(out))
    if folder.started() and settings.read_raw(folder.config_file).get("kind") == settings.KIND:
        summary = Comparison.load(folder.path).summary
        return dataclasses.replace(summary, command=command) if command else summary
    config = folder.config()
    found = records_module.read(folder.records_file)
    return build(config, found, command)


def build(config: StudyConfig, found: Records, command: str = "") -> Summary:
    """The document of a configuration and its records."""
    parts: list[Section] = []
    complete = True
    for name in config.sections:
        wanted = sections.plan(name, config, found)
        complete = complete and not wanted.later and found.finished().issuperset(run.id for run in wanted.runs)
        section = sections.module(name).summarise(config, found.where(section=name))
        if section is not None:
            parts.append(section)
    facts: dict[str, Cell] = {
        line["metric"]: line["value"] for line in found.where(run="environment") if line["metric"] != FINISHED
    }
    seconds = sum(line["value"] for line in found.where(section="environment", metric="seconds"))
    return Summary(
        title=TITLE,
        command=command or "batchnorm study",
        complete=complete,
        seconds=seconds,
        environment=facts,
        config=config.to_mapping(),
        overview=_overview(config, parts, complete),
        sections=tuple(parts),
        speedup_90=headline_page.speedup(config, found.where(section="headline")),
    )


def _overview(config: StudyConfig, parts: list[Section], complete: bool) -> Table:
    rows = tuple((part.question, part.headline) for part in parts)
    notes = []
    if config.preset == "quick":
        notes.append(
            f"A quick study: {min(config.headline.seeds, config.seeds)} seeds, shorter runs and coarser grids than the "
            "default. A first look, no figures to quote."
        )
    if not complete:
        notes.append("The study is not finished: this is what its finished runs say. Resume it for the rest.")
    return Table("What was found", ("Question", "Answer"), rows, " ".join(notes))
