"""The examples of the pages about layers run, in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("layers.md", 10),
        ("whitening.md", 3),
        ("interoperability.md", 3),
        ("domain-adaptation.md", 5),
        ("front.md", 8),
        ("sources.md", 4),
    ],
)
def test_every_example_runs(page, least):
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= least
    names: dict[str, object] = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(path), "exec"), names)
