from __future__ import annotations

import io
from pathlib import Path

import pytest

from batchnorm.cli import progress
from batchnorm.study import events
from report.test_terminal import Terminal


def finished(at: int, runs: int = 100) -> events.RunFinished:
    return events.RunFinished(
        at / runs, 50.0, 9.0, f"headline/run={at}", "headline", "batch", 0, 300, 2000, 0.951, at, runs
    )


def test_a_log_is_a_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with progress.watcher(stream, Path("runs/x")) as watch:
        watch.on_event(events.StudyStarted(0.0, None, 0.0, 100, 2))
        for at in range(1, 101):
            watch.on_event(events.RunStarted(at / 100, None, 1.0, f"headline/run={at}", "headline", "batch", 0, 2000))
            watch.on_event(finished(at))
        watch.on_event(events.StudyFinished(1.0, 0.0, 97.0, 100))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "study in runs/x: 100 runs or more, 2 side by side"
    assert lines[1] == "  5%  5 of 100 runs, headline/run=5: accuracy 0.951 after 300 steps, about 50 s left"
    assert lines[-1] == "100%  all 100 runs finished in 1 min 37 s"
    assert 15 <= len(lines) <= 25
    assert watch.finished == 100


def test_a_long_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    watch = progress.watcher(stream, Path("x"))
    watch.on_event(finished(1, 1000))
    assert stream.getvalue() == ""
    now[0] = 21.0
    watch.on_event(finished(2, 1000))
    assert stream.getvalue().startswith("  0%  2 of 1000 runs")


def test_a_study_that_goes_on_says_what_it_has_and_what_was_cut_off() -> None:
    stream = io.StringIO()
    watch = progress.watcher(stream, Path("x"))
    watch.on_event(events.StudyResumed(0.4, None, 0.0, 40, "dropped a line cut in the middle"))
    assert stream.getvalue() == "going on: 40 runs were finished before (dropped a line cut in the middle)\n"
    assert watch.finished == 40


def test_a_terminal_sees_the_whole_and_every_run_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    watch = progress.watcher(Terminal(), Path("runs/x"))
    assert isinstance(watch, progress.Screen)
    watch.on_event(events.StudyStarted(0.0, None, 0.0, 96, 2))
    watch.on_event(finished(42, 96))
    for name, variant, accuracy in (("headline/a", "batch", 0.934), ("headline/[b]", "none", None)):
        watch.on_event(events.RunStarted(0.44, 50.0, 41.0, name, "headline", variant, 3, 2000))
        watch.on_event(events.RunProgress(0.44, 50.0, 41.0, name, "headline", variant, 3, 640, 2000, accuracy))
    now[0] += 4

    def screen() -> str:
        with watch.console.capture() as capture:
            watch.console.print(watch.view())
        return " ".join(capture.get().split())

    shown = screen()
    assert "44%" in shown
    assert "42/96 runs" in shown
    # Four seconds have passed since the last event.
    assert "45 s" in shown
    assert "about 45 s left" in shown
    assert "headline/a" in shown
    assert "accuracy 0.934" in shown
    assert "headline/[b]" in shown
    assert shown.count("step 640/2000") == 2
    watch.on_event(events.RunFinished(0.46, 40.0, 46.0, "headline/a", "headline", "batch", 3, 700, 2000, 0.95, 43, 97))
    assert "headline/a" not in screen()
    assert "43/97 runs" in screen()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert type(progress.watcher(Terminal(), Path("x"))) is progress.Watcher


def test_time_left_is_told_in_steps_that_do_not_flicker() -> None:
    told = [progress.time_left(events.Event(0.5, left, 1.0)) for left in (None, 0.2, 51.9, 58.0, 63.0, 128.0)]
    assert told == [
        "estimating the time left",
        "about 5 s left",
        "about 50 s left",
        "about 1 min 00 s left",
        "about 1 min 00 s left",
        "about 2 min 10 s left",
    ]
