"""The study's page, and its summary for the terminal, drawn from the records alone: no model, no torch.

- :func:`build` writes a :class:`~batchnorm.study.document.Summary` as one HTML page that needs no network,
- :func:`rebuild` does so for the folder of a finished or interrupted run,
- :mod:`batchnorm.report.terminal` shows the same numbers in a terminal.

plotly and jinja2 are imported when a page is built, not before.
"""

from __future__ import annotations

from batchnorm.report.page import build, rebuild

__all__ = ["build", "rebuild"]
