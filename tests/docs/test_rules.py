"""Each of the doctor's rules has a page, whose example triggers it and whose remedy ends that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batchnorm.probes import rules

PAGES = Path(__file__).parents[2] / "docs" / "rules"
HEADINGS = ["What it finds", "Why it hurts", "Example", "Remedy", "False alarms"]


def test_every_rule_has_a_page_and_every_page_a_rule():
    assert {path.stem for path in PAGES.glob("BN*.md")} == {rule.code for rule in rules()}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.code)
def test_a_page_says_what_it_should(rule):
    text = (PAGES / f"{rule.code}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {rule.code}: {rule.name}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    sections = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    assert all(section.strip() for section in sections)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.code)
def test_the_example_triggers_the_rule_and_its_remedy_ends_that(rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = PAGES / f"{rule.code}.md"
    text = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    code = "".join(block[1] for block in blocks)
    assert re.search(rf'assert "{rule.code}" in bn\.diagnose\(', code)
    assert re.search(rf'assert "{rule.code}" not in bn\.diagnose\(', code)
    names: dict[str, object] = {}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(path), "exec"), names)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.code)
def test_the_explanation_on_the_command_line_is_whole(rule):
    assert re.fullmatch(r"BN\d{3}", rule.code)
    assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", rule.name)
    assert len(rule.summary) <= 120
    assert rule.summary.endswith(".")
    assert "False alarms:" in rule.explanation


def test_the_list_of_rules_is_that_of_the_program():
    text = (PAGES.parent / "doctor.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(BN\d+)\]\(rules/\1\.md\) \| (\S+) \| (\w+) \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    assert listed == [(rule.code, rule.name, rule.severity, rule.needs, rule.summary) for rule in rules()]
