"""Each equation of the derivations names a function that exists, in which the lines that are quoted stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "derivations").glob("*.md"))
LINK = re.compile(r"\[`([\w.]+)`\]\((?:\.\./)+(src/[\w/.]+\.py)\)")
PART = re.compile(rf"{LINK.pattern}|^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def source_of(path: Path, name: str) -> str:
    """The source of ``function`` or ``Class.method``."""
    text = path.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    for part in name.split("."):
        (found,) = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part]
        body = found.body
    return ast.get_source_segment(text, found) or ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_quoted_line_stands_in_the_function_before_it(page):
    text = page.read_text(encoding="utf-8")
    lines = set()
    quoted = 0
    for name, path, code in PART.findall(text):
        if name:
            lines = {line.strip() for line in source_of(ROOT / path, name).splitlines()}
            continue
        assert lines, "a quotation without a function before it"
        for line in code.splitlines():
            assert line.strip() in lines, f"{line!r} is not a line of the function that is named"
            quoted += 1
    assert quoted >= 15
