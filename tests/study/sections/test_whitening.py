"""Whitening layers beside BN: the plan, a tiny run, and words that follow the numbers."""

from __future__ import annotations

import dataclasses

import pytest

from batchnorm.study import records, run_study, sections
from batchnorm.study.records import Records
from batchnorm.study.sections import whitening
from study.tiny import TINY

CONFIG = dataclasses.replace(TINY, seeds=2, sections=("whitening",))


def test_the_runs_of_a_plan_are_told_apart_and_stay_the_same():
    runs = whitening.plan(CONFIG, Records(())).runs
    assert len({run.id for run in runs}) == len(runs) == 12
    assert runs == whitening.plan(CONFIG, Records(())).runs
    assert {(run.variant, run.params["group_size"]) for run in runs} == {
        ("batch", 1),
        ("iternorm", 4),
        ("decorrelated", 4),
    }
    # A rate is chosen by these figures, so the test part must not see them.
    assert {run.params["judge"] for run in runs} == {"validation"}


def test_a_tiny_run_says_everything(tmp_path):
    config = dataclasses.replace(CONFIG, seeds=1)
    document = run_study(config, tmp_path / "run", workers=1)
    assert document.complete
    (section,) = document.sections
    assert section.title == sections.SECTIONS["whitening"]
    assert [figure.id for figure in section.figures] == ["whitening-sigmoid", "whitening-relu", "whitening-costs"]
    assert len(section.tables[0].rows) == 6
    found = records.read(tmp_path / "run" / "records.jsonl")
    assert found.where(variant="iternorm", group=4, metric="accuracy").lines


def made_up(arrivals, seconds):
    """``arrivals[norm]``: the steps at which 90% and 95% are reached, None for never, with 1 step more for seed 1."""
    lines = []
    for run in whitening.plan(CONFIG, Records(())).runs:
        marks = arrivals[run.variant]
        for step in range(0, 60, 2):
            accuracy = 0.5
            for level, mark in zip((0.9, 0.95), marks, strict=True):
                if mark is not None and step >= mark + 2 * run.seed:
                    accuracy = level
            lines.append(run.record(step, "accuracy", accuracy))
        lines.append(run.record(58, "seconds", seconds[run.variant], what="step"))
        lines.append(run.finished(58))
    return whitening.summarise(CONFIG, Records(tuple(lines)))


SLOW = {"batch": 0.001, "iternorm": 0.004, "decorrelated": 0.003}


def test_the_words_follow_the_numbers():
    usual = made_up({"batch": (20, 30), "iternorm": (10, 40), "decorrelated": (10, 30)}, SLOW)
    assert "to 90% in fewer steps than BN with every seed in 4 of 4 cases, in more in 0" in usual.headline
    assert "to 95% in fewer steps than BN with every seed in 0 of 4 cases, in more in 2" in usual.headline
    assert "a step takes 3 to 4 x as long; in time NONE beat BN to 95%." in usual.headline
    assert any("A difference to 95%" in text and "DBN" in text for text in usual.does_not_show)
    row = next(row for row in usual.tables[0].rows if row[:2] == ("sigmoid", "IterNorm, groups of 4"))
    assert row[3:9] == (11, 10, 12, 41, 40, 42)
    assert row[-1] == pytest.approx(4.0)


def test_the_words_follow_the_opposite_numbers():
    better = made_up({"batch": (20, 50), "iternorm": (4, 6), "decorrelated": (30, None)}, SLOW)
    assert "to 90% in fewer steps than BN with every seed in 2 of 4 cases, in more in 2" in better.headline
    assert "IterNorm, groups of 4 (sigmoid) and IterNorm, groups of 4 (ReLU) beat BN to 95%" in better.headline
    assert "NONE" not in better.headline
    assert any("That fewer steps are less time" in text for text in better.does_not_show)


def test_where_nobody_arrives_the_lower_mark_is_compared():
    short = made_up({"batch": (20, None), "iternorm": (10, None), "decorrelated": (2, None)}, SLOW)
    assert "in time DBN, groups of 4 (sigmoid) and DBN, groups of 4 (ReLU) beat BN to 90%" in short.headline
    assert "95% after never" in " ".join(short.shows)


def test_too_few_records_say_nothing():
    assert whitening.summarise(CONFIG, Records(())) is None
