"""The example of watching runs, and its pages are there."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("plotly")

PATH = Path(__file__).parents[2] / "examples" / "watch_training.py"


def test_both_networks_are_watched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--steps", "260", "--out", str(tmp_path)])
    runpy.run_path(str(PATH), run_name="__main__")
    said = capsys.readouterr().out
    accuracies = [float(found) for found in re.findall(r"accuracy (\d\.\d+)", said)]
    moved = [float(found) for found in re.findall(r"moves (\d+\.\d+) std", said)]
    assert accuracies[1] > 0.93 > 0.6 > accuracies[0]
    assert moved[0] > moved[1]
    assert {path.name for path in tmp_path.iterdir()} == {"watch-without.html", "watch-with.html"}
