"""The view of a watch in the terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import groupby
from typing import Any

import pytest
from rich.console import Console

from batchnorm._errors import InputError
from batchnorm.report import LiveView
from batchnorm.report.live import sparkline
from report.watch_samples import nasty, record, run


class Watch:
    """As much of a watch as the view reads."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}
        self.layers: tuple[str, ...] = ("never called",)

    def latest(self, layer: str) -> dict[str, Any]:
        if layer not in self.seen:
            raise InputError("not yet")
        return self.seen[layer]


def play(view: LiveView, records: list[dict[str, Any]]) -> Watch:
    watch = Watch()
    for _, looks in groupby(records, key=lambda item: item["step"]):
        for look in looks:
            watch.seen[look["layer"]] = look
        watch.layers = ("never called", *watch.seen)
        view(watch)
    return watch


def console(width: int = 100, height: int = 30, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, height=height, color_system=None, highlight=False
    )


def shown(of: Any, width: int = 100, height: int = 30) -> list[str]:
    plain = console(width, height, terminal=False)
    plain.print(of)
    return plain.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_line_for_each_layer_the_worst_first() -> None:
    view = LiveView(console())
    play(view, run(3, dead=0.0, saturated=0.25))
    lines = shown(view)
    assert lines[0].strip() == "step 380   3 layers, the worst first"
    assert lines[2].split() == ["layer", "gap", "var", "ratio", "dead", "gradient", "saturated", "median"]
    rows = [line.split() for line in lines[4:7]]
    assert [row[0] for row in rows] == ["features.0.norm", "features.1.norm", "features.2.norm"]
    assert rows[0][1:6] == ["0.032", "1\u20131", "0%", "0.14", "25%"]
    view = LiveView(console())
    play(view, run(5, dead=0.0))
    rows = [line.split() for line in shown(view)[4:9]]
    assert rows[0][0] == "features.4.norm"
    assert rows[0][2] == "1\u20131.4"


def test_the_screen_is_never_fuller_than_the_terminal() -> None:
    for width in (30, 40, 60, 80, 100, 200):
        for height in (8, 12, 24, 200):
            view = LiveView(console(width, height))
            play(view, run(100, 100))
            lines = shown(view, width, height)
            assert len(lines) < max(height, 9)
            assert max(map(len, lines)) <= width
            if height == 12:
                assert lines[-1].strip() == "and 95 more"


def test_names_that_do_not_fit_lose_what_they_share() -> None:
    view = LiveView(console(40, 30))
    names = [f"model.backbone.stage{at}.a_block_with_a_name.norm" for at in range(3)]
    play(view, [record(0, name) for name in names])
    assert {line.split()[0] for line in shown(view, 40)[4:7]} == {f"\u2026stage{at}\u2026" for at in range(3)}


def test_a_terminal_is_drawn_anew_at_each_look_and_keeps_the_last() -> None:
    screen = console()
    with LiveView(screen) as view:
        play(view, run(2, 100))
        drawn = screen.file.getvalue()  # type: ignore[attr-defined]
        assert [f"step {step} " in drawn for step in (0, 20, 80)] == [True] * 3
        screen.print("a line of the training's")
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "a line of the training's" in text
    assert text.rindex("step 80") > text.rindex("a line of the training's")
    assert "waiting for the first look" in text
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_the_cursor_is_back_after_an_error() -> None:
    screen = console()
    with pytest.raises(ValueError, match="torn"), LiveView(screen) as view:
        play(view, [record(0), record(20, mean_gap="torn")])
    assert screen.file.getvalue().endswith("\x1b[?25h")  # type: ignore[attr-defined]


def test_elsewhere_nothing_is_shown_but_the_table_that_was_asked_for() -> None:
    log = console(terminal=False)
    with LiveView(log) as view:
        play(view, run(40, 100))
    assert log.file.getvalue() == ""  # type: ignore[attr-defined]
    with LiveView(log, final=True) as view:
        play(view, run(40, 100))
    text = log.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("step ") == 1
    assert all(f"features.{at}.norm" in text for at in range(40))
    assert "\x1b" not in text
    with LiveView(console(terminal=False), final=True) as view:
        pass
    assert view.console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_what_is_broken_missing_or_old_is_seen() -> None:
    view = LiveView(console())
    play(view, [*nasty(), record(999, "latest", dead=1.0)])
    plain = Console(file=io.StringIO(), width=200, record=True)
    plain.print(view.table())
    text = plain.export_text(clear=False)
    assert "NaN or inf" in text
    assert "the model" in text
    assert "</script>" in text  # as it is, no markup
    assert "relu" in text
    svg = plain.export_svg()
    assert "svg" in svg


def test_a_look_that_a_layer_was_not_part_of_is_not_counted_twice() -> None:
    view = LiveView(console())
    watch = play(view, run(1, 60))
    view(watch)
    view(watch)
    assert len(view._medians["features.0.norm"]) == 3


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "\u2584\u2584"
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def test_neither_torch_nor_plotly_is_needed() -> None:
    code = (
        "import sys\nfrom batchnorm.report import LiveView\n"
        "print([name for name in ('torch', 'plotly', 'jinja2', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
