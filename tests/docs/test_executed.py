"""The tutorial's and the how-to pages' code runs, and prints what the pages say it prints."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_site"))
import executed

PAGES = executed.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_prints_and_draws_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    try:
        outputs = list(executed.execute(page, tmp_path / "images"))
    finally:
        torch.set_num_threads(threads)
    for printed in outputs:
        difference = executed.differs(printed.expected, printed.got, printed.tolerance)
        assert difference is None, f"{page.name}, line {printed.line}: {difference} (`make docs` writes it anew)"
    text = page.read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(images/([\w.-]+\.svg)\)", text))
    assert shown == {path.name for path in tmp_path.glob("images/*.svg")}
    for name in shown:
        committed = page.parent / "images" / name
        assert committed.read_text(encoding="utf-8").startswith("<svg ")
        assert committed.stat().st_size < 120_000  # a page asks for a few of them, and 1,200 dots take 80 KB


def test_the_tutorial_has_outputs_and_figures():
    texts = [page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "tutorial"]
    assert sum(text.count("```text\n") for text in texts) >= 20
    assert sum(text.count("<!-- figure ") for text in texts) >= 6


@pytest.mark.parametrize(
    ("expected", "got", "tolerance", "same"),
    [
        ("loss 1.25\n", "loss 1.26\n", 0.0, True),  # the last printed digit
        ("loss 1.25\n", "loss 1.27\n", 0.0, False),
        ("loss 100\n", "loss 104\n", 0.05, True),
        ("loss 100\n", "loss 120\n", 0.05, False),
        ("b 5.1e+08\n", "b 5.2e+08\n", 0.0, True),
        ("b 5.1e+08\n", "b 5.9e+08\n", 0.0, False),
        ("True 1\n", "False 1\n", 1.0, False),
        ("one 1\n", "one 1 2\n", 1.0, False),
    ],
)
def test_outputs_are_compared_number_by_number(expected, got, tolerance, same):
    assert (executed.differs(expected, got, tolerance) is None) == same
