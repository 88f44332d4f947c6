"""The ways that a whole step can be launched."""

from __future__ import annotations

import dataclasses

import pytest

from batchnorm.ops.triton import plan

BOTH = plan.both
ROUTES = ("alone", "meeting", "two launches")


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch steps one way.

    "alone": each unit is one program's. "meeting": both phases in one launch with everything that programs which share
    a unit do, parts left in memory, arrivals, waiting; but one program after the other, as the interpreter has no
    others to wait for, so that a unit has a single one. "two launches": units shared by several programs, the last of
    which finishes the statistics, and a second launch.
    """
    if route == "two launches":
        monkeypatch.setenv(plan.COOPERATIVE_SWITCH, "0")

    def launch(problem: plan.Problem, device: plan.Device) -> plan.Launch:
        found = BOTH(problem, device)
        if route == "two launches":
            return dataclasses.replace(found, split=True)
        lanes = plan._units(problem)[0] if route == "alone" else min(2, found.lanes)
        return dataclasses.replace(found, lanes=lanes, splits=1, programs=lanes, split=route == "meeting")

    monkeypatch.setattr(plan, "both", launch)
