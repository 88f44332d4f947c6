"""To come."""

from __future__ import annotations

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run
from batchnorm.study.records import Record, Records


def plan(config: StudyConfig, records: Records) -> Plan:
    """The runs of this section."""
    return Plan(())


def execute(run: Run, report: Report) -> list[Record]:
    """Execute one run."""
    return []


def summarise(config: StudyConfig, records: Records) -> Section | None:
    """This section of the document."""
    return None
