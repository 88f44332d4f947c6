"""Seeded experiments that show what normalization does to a network, and what it does not.

>>> from batchnorm import study
>>> summary = study.run_study(study.PRESETS["quick"], "out")                 # doctest: +SKIP
>>> summary.speedup_90["ratio"]["median"]                                    # doctest: +SKIP

Importing this package, planning a study and making its document need no torch; only running it does.
"""

from __future__ import annotations

from batchnorm.study import events
from batchnorm.study.config import PRESETS, StudyConfig
from batchnorm.study.document import Summary
from batchnorm.study.pool import RunFailedError
from batchnorm.study.runs import available_cores, run_study
from batchnorm.study.sections import SECTIONS
from batchnorm.study.summary import load_summary, summarise

__all__ = [
    "PRESETS",
    "SECTIONS",
    "RunFailedError",
    "StudyConfig",
    "Summary",
    "available_cores",
    "events",
    "load_summary",
    "run_study",
    "summarise",
]
