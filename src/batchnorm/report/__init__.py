"""The study's page, and its summary for the terminal, drawn from the records alone: no model, no torch.

- :func:`build` writes a :class:`~batchnorm.study.document.Summary` as one HTML page that needs no network,
- :func:`rebuild` does so for the folder of a finished or interrupted run,
- :func:`write_pair_page` holds two such folders against each other,
- :func:`write_watch_page` draws the records of a watch, and :class:`LiveView` shows one in the terminal as it runs,
- :mod:`batchnorm.report.terminal` shows the same numbers in a terminal.

plotly, matplotlib and jinja2 are imported when a page is built, rich when something is shown, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchnorm.report.page import build, rebuild

if TYPE_CHECKING:
    from batchnorm.report.live import LiveView
    from batchnorm.report.pair import write_pair_page
    from batchnorm.report.watch import write_watch_page

__all__ = ["LiveView", "build", "rebuild", "write_pair_page", "write_watch_page"]


def __getattr__(name: str) -> Any:
    if name == "LiveView":
        from batchnorm.report.live import LiveView

        return LiveView
    if name == "write_pair_page":
        from batchnorm.report.pair import write_pair_page

        return write_pair_page
    if name == "write_watch_page":
        from batchnorm.report.watch import write_watch_page

        return write_watch_page
    raise AttributeError(f"module 'batchnorm.report' has no attribute {name!r}")
