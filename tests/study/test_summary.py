"""The document: made without torch, honest about what is missing, and right about the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from batchnorm.study import PRESETS, Summary, config, load_summary, run_study, sections, summarise, summary
from batchnorm.study.plan import Run
from batchnorm.study.records import Records, read
from study.tiny import TINY

SOURCE = Path(summary.__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("summary") / "run"
    run_study(TINY, path, workers=1)
    return path


WITHOUT_TORCH = """
    import sys
    sys.path.insert(0, {source!r})
    class Wall:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "sklearn", "numpy"):
                raise ImportError("blocked: " + name)
    sys.meta_path.insert(0, Wall())
    from batchnorm import study
    assert len(study.summarise(sys.argv[1]).sections) == {count}
    assert study.load_summary(sys.argv[1]).complete
    print(study.summarise(sys.argv[1]).to_json(), end="")
"""


def test_the_document_is_made_without_torch(folder):
    script = textwrap.dedent(WITHOUT_TORCH.format(source=str(SOURCE), count=len(TINY.sections)))
    ended = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    assert ended.stdout == summarise(folder).to_json()


def test_it_survives_json(folder):
    document = summarise(folder)
    assert Summary.from_json(document.to_json()).to_json() == document.to_json()
    assert load_summary(folder).to_json() == document.to_json()


def test_every_section_says_everything(folder):
    document = summarise(folder)
    assert [section.title for section in document.sections] == [sections.SECTIONS[name] for name in TINY.sections]
    identifiers = [figure.id for section in document.sections for figure in section.figures]
    assert len(set(identifiers)) == len(identifiers)
    for section in document.sections:
        assert section.question.endswith("?")
        assert section.headline.endswith(".")
        assert "\n" not in section.headline
        assert section.shows
        assert section.does_not_show
        assert section.setup["seeds"]
        assert section.tables
        assert section.figures
        for figure in section.figures:
            assert figure.alt
            assert figure.caption
            for series in figure.series:
                length = len(series.x)
                assert length == len(series.y) > 0
                assert all(edge is None or len(edge) == length for edge in (series.low, series.high))
        for table in section.tables:
            assert table.rows
            assert all(len(row) == len(table.columns) for row in table.rows)
    assert document.overview.rows == tuple((part.question, part.headline) for part in document.sections)


def test_the_heatmaps_are_whole(folder):
    identity = next(part for part in summarise(folder).sections if part.name == "identity")
    maps = [figure for figure in identity.figures if figure.kind == "heatmap"]
    assert len(maps) == 3
    for figure in maps:
        grid, first, second = figure.series
        assert len(grid.z) == len(grid.y) == TINY.identity.grid
        assert all(len(row) == len(grid.x) for row in grid.z)
        assert all(0.0 <= value <= 1.0 for row in grid.z for value in row)
        assert len(first.x) + len(second.x) == TINY.identity.points // 4


def test_part_of_the_runs_gives_part_of_the_document(folder, tmp_path):
    found = read(folder / "records.jsonl")
    without = Records(tuple(line for line in found if line["run"] != "deep/plain/batch/layers=2/lr=1/seed=0"))
    document = summary.build(TINY, without)
    assert not document.complete
    assert [part.name for part in document.sections] == [name for name in TINY.sections if name != "deep"]
    assert "not finished" in document.overview.note
    (tmp_path / "config.toml").write_text(TINY.to_toml())
    (tmp_path / "records.jsonl").write_text("")
    nothing = summarise(tmp_path)
    assert (nothing.sections, nothing.speedup_90, nothing.complete) == ((), None, False)


def test_at_every_point_of_a_study_there_is_a_document(folder):
    """However a study is interrupted, what is there can be summed up."""
    lines = read(folder / "records.jsonl").lines
    ends = [place for place, line in enumerate(lines) if line["metric"] == "finished"]
    for end in ends:
        document = summary.build(TINY, Records(lines[: end + 1]))
        json.loads(document.to_json())


def test_a_quick_study_says_so():
    assert "A quick study: 3 seeds, shorter runs" in summary.build(PRESETS["quick"], Records(())).overview.note
    assert "quick" not in summary.build(PRESETS["default"], Records(())).overview.note


def invented(arrivals, *, step_seconds=(0.001, 0.002), hot=0.2):
    """Records of a headline whose nets reach 90% when ``arrivals`` say so: case -> (without, with), None for never."""
    wanted = config.Headline(seeds=3, lrs=(1.0, 2.0), wide_lrs=(1.0,), relu_lrs=(0.1,))
    study = config.StudyConfig(headline=wanted, sections=("headline",))
    lines, plan = [], sections.plan("headline", study, Records(()))
    for _ in range(2):
        done = {line["run"] for line in lines}
        for run in plan.runs:
            if run.id not in done:
                lines += _curve(run, arrivals, step_seconds, hot)
        plan = sections.plan("headline", study, Records(tuple(lines)))
    assert plan.later == 0.0
    return study, Records(tuple(lines))


def _curve(run: Run, arrivals, step_seconds, hot):
    case = run.labels["case"]
    if case == "hot":
        arrival, low = (None, hot)
    elif case.startswith("tune-"):
        arrival, low = 100 if run.labels["lr"] == 1.0 or case != "tune-tuned" else 50, 0.1
    else:
        arrival, low = arrivals.get(case, (100, 50))[run.variant == "batch"], 0.1
        arrival = arrival[run.seed] if isinstance(arrival, tuple) else arrival
    steps = range(0, 1001, 10)
    values = [(step, 0.96 if arrival is not None and step >= arrival else low) for step in steps]
    seconds = run.record(1000, "seconds", step_seconds[run.variant == "batch"], what="step")
    return [*(run.record(step, "accuracy", value) for step, value in values), seconds, run.finished(1000)]


def test_the_headline_is_what_the_records_say():
    study, found = invented({"tuned": ((600, 800, 700), (30, 20, 50)), "wide-init": (120, 40), "relu": (60, 20)})
    document = summary.build(study, found)
    speedup = document.speedup_90
    assert speedup["ratio"] == {"median": 20.0, "low": 14.0, "high": 40.0, "values": (20.0, 40.0, 14.0)}
    assert speedup["baseline_steps"]["values"] == (600, 800, 700)
    assert speedup["bn_steps"]["median"] == 30
    assert (speedup["baseline_lr"], speedup["bn_lr"], speedup["threshold"]) == (2.0, 2.0, 0.9)
    assert speedup["seeds"] == [0, 1, 2]
    (part,) = document.sections
    assert part.headline == (
        "BN reaches 90% in 20 [14, 40] times fewer steps than the tuned baseline: 30 [20, 50] instead of 700 "
        "[600, 800] (about 10 x in time, as a step costs 2 x)."
    )
    assert "at least the 14 that the paper reports" in part.shows[0]
    assert "Weights begin 4 x as large: the ratio is 3. Much of the gain repairs" in part.does_not_show[0]
    assert "ReLU and He initialisation: the ratio is 3. A net that begins well gains less." in part.does_not_show[1]
    assert "fails in 3 of 3 seeds (best 20.0%)" in part.does_not_show[2]
    assert "no gain in final accuracy beyond the noise" in part.does_not_show[3]


def test_where_the_claim_fails_the_words_say_so():
    study, found = invented({"tuned": (200, 40), "wide-init": (400, 40), "relu": (500, 20)})
    part = summary.build(study, found).sections[0]
    assert "less than the 14 that the paper reports" in part.shows[0]
    assert "the ratio is 10. Not so here." in part.does_not_show[0]
    assert "the ratio is 25. The gain is no smaller here." in part.does_not_show[1]
    study, found = invented({"tuned": (40, 80)})
    assert "0.5 times as many steps" not in summary.build(study, found).sections[0].headline
    assert "BN is slower" in summary.build(study, found).sections[0].headline


def test_a_baseline_that_never_arrives_gives_no_ratio():
    study, found = invented({"tuned": (None, 40)})
    document = summary.build(study, found)
    assert document.speedup_90["ratio"]["median"] is None
    assert document.speedup_90["bn_steps"]["median"] == 40
    assert document.sections[0].headline.startswith("No ratio can be given: to 90%, the tuned baseline took never")
    study, found = invented({"tuned": ((500, None, 600), 20)})
    assert summary.build(study, found).speedup_90["ratio"] == {
        "median": 30.0, "low": 25.0, "high": None, "values": (25.0, None, 30.0),
    }  # fmt: skip


def test_the_rate_is_tuned_on_validation_and_never_on_test():
    plan = sections.plan("headline", PRESETS["default"], Records(()))
    assert plan.later > 0
    assert {run.params["judge"] for run in plan.runs} == {"validation"}
    assert all(run.labels["case"].startswith("tune-") and run.variant == "none" for run in plan.runs)
    study, found = invented({})
    later = [run for run in sections.plan("headline", study, found).runs if "judge" not in run.params]
    assert {run.params["lr"] for run in later if run.labels["case"] == "tuned"} == {2.0}
    assert {run.params["lr"] for run in later if run.labels["case"] == "hot"} == {60.0}
    assert {(run.variant, run.params["lr"]) for run in later if run.labels["case"] == "conservative"} == {
        ("none", 0.3), ("batch", 0.3), ("batch", 1.5),
    }  # fmt: skip
