from __future__ import annotations

import io
import sys

import pytest

from batchnorm.report import terminal
from report import samples


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, **changes: object) -> str:
    terminal.console_for(stream).print(terminal.render(samples.summary(**changes)))
    return stream.getvalue()


def test_the_summary_tells_the_headline_its_limits_and_every_answer() -> None:
    text = " ".join(shown(io.StringIO()).split())
    assert "19.6 times fewer steps to 90% test accuracy with batch norm (16.9\u201327 over 5 seeds)" in text
    assert "without normalization: 654 (610\u2013700)" in text
    assert "- With a 4 x Xavier init the ratio is 3.5, with ReLU and He init 2.5." in text
    assert "32 with batch norm, 654 without: 19.6 times" in text
    assert "How many steps does each net need?" in text


def test_no_control_characters_where_no_terminal_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown(io.StringIO())
    assert all(character == "\n" or character >= " " for character in text)


def test_a_terminal_gets_bold_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1m" in shown(Terminal())


def test_strings_are_shown_as_they_are() -> None:
    limits = samples.section("headline", does_not_show=("[bold]not markup[/bold] [/] <b>",))
    assert "- [bold]not markup[/bold] [/] <b>" in shown(io.StringIO(), sections=(limits,))


def test_no_ratio_and_no_end_are_said() -> None:
    speedup = samples.speedup(ratio=samples.spread(12.0, None, None), bn_steps=samples.spread(None, None, None))
    text = shown(io.StringIO(), speedup_90=speedup, complete=False)
    assert "This study is not finished" in text
    assert "No ratio: 90% test accuracy was not reached by both." in text
    assert "with batch norm: not reached (no seed arrived)" in text


def test_the_terminal_needs_neither_plotly_nor_torch() -> None:
    import subprocess

    code = (
        "import sys\n"
        "import batchnorm.report.terminal, batchnorm.report\n"
        "print([name for name in ('torch', 'plotly', 'jinja2', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
