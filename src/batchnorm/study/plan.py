"""A run and a section's plan of runs, as plain data that travels to a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchnorm.study.records import FINISHED, Record


@dataclass(frozen=True)
class Run:
    """One seeded unit of work.

    ``id`` is stable (``headline/tuned/batch/lr=2/seed=0``): a resumed study knows a finished run by it. ``params`` say
    what the section's ``execute`` has to do; ``labels`` are written on each of its records (``lr``, ``case``, ...).
    ``steps`` is the most it takes, ``cost`` its expected seconds, for the time left.
    """

    id: str
    section: str
    variant: str
    seed: int
    steps: int
    cost: float
    params: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)

    def record(self, step: int, metric: str, value: Any, **more: Any) -> Record:
        """One line of this run's records."""
        head = {"section": self.section, "variant": self.variant, "seed": self.seed, "step": step}
        return {**head, "metric": metric, "value": value, "run": self.id, **self.labels, **more}

    def finished(self, step: int) -> Record:
        """The line that ends this run's block."""
        return self.record(step, FINISHED, True)


@dataclass(frozen=True)
class Plan:
    """The runs that a section needs as far as its records so far can tell.

    Later runs may depend on the results of earlier ones (a rate that is tuned first); ``later`` is the cost in seconds
    that is still to be expected for those.
    """

    runs: tuple[Run, ...]
    later: float = 0.0


Report = Callable[[int, float | None], None]
"""What a run calls as it goes: ``report(step, accuracy)``."""


def run_id(section: str, *parts: str, seed: int, **labels: float | int | str) -> str:
    """The stable id of a run: its parts, its labels as ``key=value`` (numbers in shortest form) and its seed."""
    named = [
        f"{key}={value:g}" if isinstance(value, int | float) else f"{key}={value}" for key, value in labels.items()
    ]
    return "/".join([section, *parts, *named, f"seed={seed}"])
