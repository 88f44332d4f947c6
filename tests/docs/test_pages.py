"""The examples of the pages run, in their order."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("../README.md", 3),
        ("index.md", 1),
        ("data.md", 5),
        ("compare.md", 4),
        ("doctor.md", 2),
        ("layers.md", 10),
        ("whitening.md", 3),
        ("interoperability.md", 3),
        ("domain-adaptation.md", 5),
        ("front.md", 8),
        ("sources.md", 4),
        ("folding.md", 3),
        ("recalibration.md", 5),
        ("freezing.md", 2),
        ("test-time-adaptation.md", 2),
        ("inserting.md", 2),
        ("watch.md", 5),
        ("surgery.md", 4),
    ],
)
def test_every_example_runs(page, least, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what an example writes goes with the test
    monkeypatch.chdir(tmp_path)
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= least
    names: dict[str, object] = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(path), "exec"), names)
