"""The sections of the study: each plans its runs, executes one, and makes its part of the document from the records.

A section's module is imported without torch; only ``execute`` imports it, in the process that does the work.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Section
from batchnorm.study.plan import Plan, Report, Run
from batchnorm.study.records import Record, Records

SECTIONS: dict[str, str] = {
    "headline": "How much faster does a network learn with batch normalization?",
    "deep": "Does it train where a plain network does not?",
    "initialisation": "Does it matter how large the weights are at the start?",
    "convnet": "And in a convolutional network?",
    "distribution": "What happens to the input of a typical unit?",
    "landscape": "Is the loss smoother?",
    "outside": "Why not normalize outside the gradient?",
    "preprocessing": "What does preparing the raw data do?",
    "identity": "What are gamma and beta for?",
    "batches": "What about small batches, and sorted ones?",
    "domains": "And when the test data are of another kind?",
    "whitening": "Would whitening be better still?",
    "mnist": "The paper's experiment: MNIST",
    "cifar10": "And on photographs: CIFAR-10",
}
"""The names of the sections and their titles, in the page's order."""


class SectionModule(Protocol):
    """What each module of this package offers."""

    def plan(self, config: StudyConfig, records: Records) -> Plan:
        """The runs that are needed, given the records so far."""

    def execute(self, run: Run, report: Report) -> list[Record]:
        """Execute one run and return its records, without the completion record."""

    def summarise(self, config: StudyConfig, records: Records) -> Section | None:
        """This section of the document, from its records; None where they are too few to say anything."""


def plan(name: str, config: StudyConfig, records: Records) -> Plan:
    """The runs that section ``name`` needs, given all records so far."""
    return module(name).plan(config, records.where(section=name))


def execute(run: Run, report: Report) -> list[Record]:
    """Execute one run; its records, the completion record last."""
    block = module(run.section).execute(run, report)
    return [*block, run.finished(block[-1]["step"] if block else run.steps)]


def module(name: str) -> SectionModule:
    """The module of section ``name``."""
    return cast(SectionModule, importlib.import_module(f"batchnorm.study.sections.{name}"))
