"""The study as a whole: the same seed, interruptions, events, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from batchnorm import ConfigError, OutputError, RecordsError
from batchnorm.ops import native
from batchnorm.study import RunFailedError, events, load_summary, run_study, runs, sections, summarise
from batchnorm.study.records import read
from study.tiny import TINY

SOURCE = Path(runs.__file__).parents[2]


def timeless(folder):
    """The records in the file's order, without what may differ: wall times."""
    return [line for line in read(folder / "records.jsonl") if line["metric"] != "seconds"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished tiny study and the events it gave."""
    folder, seen = tmp_path_factory.mktemp("whole") / "run", []
    run_study(TINY, folder, workers=1, on_event=seen.append, command="batchnorm study --tiny")
    return folder, seen


def test_a_finished_folder(whole):
    folder, _ = whole
    assert sorted(item.name for item in folder.iterdir()) == ["config.toml", "records.jsonl", "summary.json"]
    summary = load_summary(folder)
    assert summary.complete
    assert summary.command == "batchnorm study --tiny"
    assert [section.name for section in summary.sections] == list(TINY.sections)
    assert summary.seconds > 0
    assert set(summary.environment) == {
        "python", "torch", "numpy", "scikit-learn", "batchnorm", "implementation", "platform", "cpu_count",
    }  # fmt: skip
    assert summary.environment["implementation"].split(":")[0] == native.status().active
    assert summary.environment["torch"] == str(torch.__version__)
    # Lists and tuples are one in JSON: compare as JSON.
    assert summarise(folder, command=summary.command).to_json() == summary.to_json()


def test_every_record_says_what_it_is(whole):
    for line in (whole[0] / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert type(record["seed"]) is int
        assert type(record["step"]) is int
        assert all(isinstance(record[key], str) for key in ("section", "variant", "metric", "run"))
        assert record["run"].startswith(record["section"])


def test_a_runs_lines_are_one_block_ended_by_its_completion(whole):
    lines = list(read(whole[0] / "records.jsonl"))
    ends = [place for place, line in enumerate(lines) if line["metric"] == "finished"]
    start = 0
    for end in ends:
        assert len({line["run"] for line in lines[start : end + 1]}) == 1
        start = end + 1
    assert start == len(lines)
    assert len({lines[end]["run"] for end in ends}) == len(ends)


def test_the_same_seed_gives_the_same_records(whole, tmp_path):
    run_study(TINY, tmp_path / "again", workers=1)
    assert timeless(tmp_path / "again") == timeless(whole[0])


def test_another_seed_gives_others(whole, tmp_path):
    config = TINY.with_options(seed=5, sections=("deep",))
    run_study(config, tmp_path / "other", workers=1)
    found = read(tmp_path / "other" / "records.jsonl")
    assert {line["seed"] for line in found} == {5}
    first = read(whole[0] / "records.jsonl").where(section="deep", variant="batch").curve("accuracy")
    assert found.where(section="deep", variant="batch").curve("accuracy") != first


def test_the_process_is_left_as_it_was(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run_study(TINY.with_options(sections=("deep",)), tmp_path / "run", workers=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_events_tell_the_whole_story(whole):
    _, seen = whole
    assert type(seen[0]) is events.StudyStarted
    assert type(seen[-1]) is events.StudyFinished
    fractions = [event.fraction for event in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    started = [event.run for event in seen if isinstance(event, events.RunStarted)]
    finished = [event for event in seen if isinstance(event, events.RunFinished)]
    assert started == [event.run for event in finished]
    assert len(set(started)) == len(started) == seen[-1].runs
    assert finished[-1].finished_runs == finished[-1].known_runs == len(started)
    progress = [event for event in seen if isinstance(event, events.RunProgress)]
    assert {event.run for event in progress} <= set(started)
    assert all(0 <= event.step <= event.steps for event in progress)
    assert any(event.accuracy is not None for event in progress)
    assert any(event.seconds_left is not None for event in seen)


@pytest.mark.parametrize("after", [1, 8, 14])
def test_interrupted_and_resumed_ends_with_the_same_records(whole, tmp_path, after):
    folder, begun = tmp_path / "run", []

    def interrupt(event):
        if isinstance(event, events.RunStarted):
            begun.append(event.run)
            if len(begun) > after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, folder, workers=1, on_event=interrupt)
    kept = read(folder / "records.jsonl").finished() & set(begun)
    assert kept == set(begun[:after])
    assert not summarise(folder).complete
    seen = []
    summary = run_study(None, folder, resume=True, workers=1, on_event=seen.append)
    repeated = {event.run for event in seen if isinstance(event, events.RunStarted)} & kept
    assert not repeated
    resumed = next(event for event in seen if isinstance(event, events.StudyResumed))
    assert (resumed.finished, resumed.dropped) == (after, "")
    assert 0 < resumed.fraction < 1
    assert summary.complete
    assert timeless(folder) == timeless(whole[0])


def test_a_file_cut_in_the_middle_of_a_line_resumes(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.toml", "records.jsonl"):
        (folder / name).write_bytes((whole[0] / name).read_bytes())
    text = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(text[: len(text) // 2])
    seen = []
    run_study(TINY, folder, resume=True, workers=1, on_event=seen.append)
    resumed = next(event for event in seen if isinstance(event, events.StudyResumed))
    assert resumed.dropped.startswith("dropped ")
    assert timeless(folder) == timeless(whole[0])


def test_resuming_a_finished_study_does_nothing(whole):
    folder, _ = whole
    before = (folder / "records.jsonl").read_bytes()
    seen = []
    run_study(TINY, folder, resume=True, workers=1, on_event=seen.append, command="batchnorm study --tiny")
    assert [type(event) for event in seen] == [events.StudyStarted, events.StudyResumed, events.StudyFinished]
    assert (folder / "records.jsonl").read_bytes() == before


def test_resume_of_nothing_starts(tmp_path):
    summary = run_study(TINY.with_options(sections=("deep",)), tmp_path / "new", resume=True, workers=1)
    assert summary.complete
    assert summary.speedup_90 is None


def test_resume_with_another_configuration_says_what_differs(whole):
    other = dataclasses.replace(TINY, batch=30)
    before = (whole[0] / "records.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"cannot resume .* \(batch: 60 saved, 30 asked\): choose another folder"):
        run_study(other, whole[0], resume=True, workers=1)
    assert (whole[0] / "records.jsonl").read_bytes() == before


def test_an_occupied_folder_is_refused(whole, tmp_path):
    with pytest.raises(RecordsError, match="already holds a study: resume it, or choose another folder"):
        run_study(TINY, whole[0], workers=1)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RecordsError, match=r"already holds other files \(thesis\.tex\)"):
        run_study(TINY, tmp_path, workers=1)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot use .* as the study's folder: ") as caught:
        run_study(TINY, tmp_path / "file" / "run", workers=1)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_study(tmp_path):
    for ask in (summarise, load_summary):
        with pytest.raises(RecordsError, match=r"holds no study|cannot read"):
            ask(tmp_path)


def test_no_workers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 1 worker, got 0"):
        run_study(TINY, tmp_path / "run", workers=0)
    assert not (tmp_path / "run").exists()


def test_a_failing_run_is_named_and_the_others_are_kept(whole, tmp_path, monkeypatch):
    real, count = sections.execute, [0]

    def execute(run, report):
        count[0] += 1
        if count[0] == 3:
            raise ValueError("the disc is on fire\nand more")
        return real(run, report)

    monkeypatch.setattr(sections, "execute", execute)
    with pytest.raises(
        RunFailedError, match=r"^run headline/\S+/seed=\d failed: ValueError: the disc is on fire; finish"
    ) as caught:
        run_study(TINY, tmp_path / "run", workers=1)
    assert "\n" not in str(caught.value)
    assert len(read(tmp_path / "run" / "records.jsonl").finished() - {"environment", "environment/session"}) == 2
    run_study(TINY, tmp_path / "run", resume=True, workers=1)
    assert timeless(tmp_path / "run") == timeless(whole[0])


SCRIPT = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    sys.path[:0] = [{source!r}, {tests!r}]
    from study.tiny import TINY
    from batchnorm.study import run_study
    if __name__ == "__main__":
        tell = lambda event: print(type(event).__name__, flush=True)
        run_study(TINY, sys.argv[1], resume=True, workers=2, on_event=tell)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_and_a_signal(whole, tmp_path, how):
    """Two processes give what one gives; a signal leaves no process behind and loses no finished run."""
    script, folder = tmp_path / "run_tiny.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SCRIPT.format(source=str(SOURCE), tests=str(Path(__file__).parents[1]))))
    command = [sys.executable, str(script), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finished = 0
    for line in process.stdout:
        finished += line.strip() == "RunFinished"
        if finished == 5:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"
        assert "Process Spawn" not in errors  # no traceback of a worker's
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    kept = read(folder / "records.jsonl").finished()
    assert len(kept) >= 5
    if how == signal.SIGINT:
        subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ)
    else:
        run_study(None, folder, resume=True, workers=1)
    assert timeless(folder) == timeless(whole[0])
