"""Depth: the words follow the numbers, whichever net stops where."""

from __future__ import annotations

import pytest

from batchnorm.study import sections, summary
from batchnorm.study.config import StudyConfig
from batchnorm.study.records import Records
from batchnorm.study.settings.deep import Deep

CONFIG = StudyConfig(
    sections=("deep",),
    deep=Deep(plain_depths=(2, 3, 4), wide_depths=(6, 12), batch_depths=(2, 20), batch_lrs=(0.1, 0.3), depth_steps=800),
)


def invented(arrives):
    """The section from records in which a net is at 90% at the step that ``arrives(case, norm, layers, lr)`` gives."""
    lines = []
    for run in sections.plan("deep", CONFIG, Records(())).runs:
        step = arrives(run.labels["case"], run.variant, run.labels["layers"], run.labels["lr"])
        lines += [run.record(at, "accuracy", 0.92 if step and at >= step else 0.1) for at in range(0, 801, 20)]
        lines.append(run.finished(800))
    return summary.build(CONFIG, Records(tuple(lines))).sections[0]


def paper(case, norm, layers, lr):
    if norm == "batch":
        return 200 if layers == 20 and lr == 0.3 else 40
    limit = {"plain": 0, "depth": 3, "wide-init": 8}[case]
    return 100 if layers <= limit else None


def test_the_plan_is_whole_and_stable():
    runs = sections.plan("deep", CONFIG, Records(())).runs
    assert len({run.id for run in runs}) == len(runs) == 3 * (2 + 1 + 2 + 3 + 4)
    assert "deep/depth/batch/layers=20/lr=0.1/seed=0" in {run.id for run in runs}


def test_where_each_kind_of_net_stops():
    section = invented(paper)
    assert (
        "Without BN at the rate 2: 2 layers in 100 steps and 3 layers in 100 steps to 90%; 4 layers did not get there "
        "within 800 steps."
    ) in section.shows
    assert (
        "Without BN, begun with weights 4 x as large, at the rate 0.3: 6 layers in 100 steps to 90%; 12 layers did not "
        "get there within 800 steps."
    ) in section.shows
    assert (
        "With BN at the rate 0.1: 2 layers in 40 steps and 20 layers in 40 steps to 90%; no depth that was tried "
        "failed."
    ) in section.shows
    assert (
        "That depth costs nothing with BN: at the rate 0.3, 20 layers take 200 steps to 90% and 2 layers 40."
    ) in section.does_not_show
    assert not any("at the rate 0.1, 20 layers take" in line for line in section.does_not_show)
    figure = next(figure for figure in section.figures if figure.id == "deep-depth")
    assert {series.name: series.x for series in figure.series} == {
        "without, rate 2": (2, 3),
        "without, larger start, rate 0.3": (6,),
        "BN, rate 0.1": (2, 20),
        "BN, rate 0.3": (2, 20),
    }
    table = next(table for table in section.tables if table.title == "How deep?")
    assert [row[1] for row in table.rows] == [2, 3, 4, 6, 12, 2, 20, 2, 20]


def test_bn_that_stops_too():
    section = invented(lambda case, norm, layers, lr: 40 if layers <= 6 else None)  # noqa: ARG005
    assert (
        "With BN at the rate 0.3: 2 layers in 40 steps to 90%; 20 layers did not get there within 800 steps."
    ) in section.shows
    assert section.headline.startswith("6 x 100 sigmoid did train without BN at the rate 1 and 3 here")


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_kind_that_never_trains(norm):
    section = invented(lambda case, variant, layers, lr: None if variant == norm else 40)  # noqa: ARG005
    name = {"none": "Without BN at the rate 2", "batch": "With BN at the rate 0.1"}[norm]
    assert any(
        line.startswith((f"{name}: no depth that was tried (2, ", f"{name}: no depth that was tried (2 and"))
        for line in section.shows
    )
