"""What ``bn.compare`` gives. No torch: it is made from the configuration and the records alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.study import records as records_module
from batchnorm.study.comparison import page, planning
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.comparison.verdict import Verdict, judge
from batchnorm.study.document import Summary
from batchnorm.study.folder import RunFolder
from batchnorm.study.records import Records


@dataclass(frozen=True)
class Comparison:
    """A comparison, finished or not (``summary.complete``).

    Attributes:
        config: what was done.
        records: one line an evaluation or result: section (calibrate, search, measure), variant, seed, step, metric,
            value, run.
        summary: the document of the page.
        verdict: each variant against the first, with its uncertainty; ``str`` is a few sentences.
    """

    config: CompareConfig
    records: Records
    summary: Summary
    verdict: Verdict

    @classmethod
    def of(cls, config: CompareConfig, found: Records) -> Comparison:
        """From a configuration and records.

        >>> Comparison.of(config, records).verdict.text                          # doctest: +SKIP
        """
        config = planning.settled(config, found)
        return cls(config, found, page.build(config, found), judge(config, found))

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """The comparison in a folder, as far as it is.

        Raises:
            RecordsError: there is none, or its records are damaged.
        """
        files = RunFolder(Path(folder))
        return cls.of(CompareConfig.load(files.config_file), records_module.read(files.records_file))

    def rates(self) -> dict[str, float | None]:
        """The learning rate that each variant was measured at; None where it is not known yet."""
        return {name: page.rate(self.config, self.records, name) for name in self.config.variants}

    def table(self) -> str:
        """The overview as text: a row for each variant."""
        found = self.summary.overview
        rows = [found.columns, *(tuple("-" if cell is None else str(cell) for cell in row) for row in found.rows)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(found.columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the verdict, the rates, the configuration and the document."""
        return {
            "verdict": self.verdict.to_dict(),
            "rates": self.rates(),
            "complete": self.summary.complete,
            "config": self.config.to_mapping(),
            "summary": dataclasses.asdict(self.summary),
        }

    def to_html(self, path: str | Path) -> Path:
        """Write the page to a file and return its path.

        Raises:
            MissingDependencyError: plotly or jinja2 is not installed.
            OutputError: the file cannot be written.
        """
        # A room to the right, entered only where a user asks for it (see tests/test_architecture.py).
        from batchnorm.report import build

        return build(self.summary, Path(path))

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.verdict}"

    def __repr__(self) -> str:
        done = "" if self.summary.complete else ", not finished"
        return f"Comparison({self.config.model} on {self.config.data}: {', '.join(self.config.variants)}{done})"
