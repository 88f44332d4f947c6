from __future__ import annotations

import builtins
import dataclasses
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from batchnorm import report
from batchnorm._errors import MissingDependencyError, OutputError
from batchnorm.report.page import render
from report import samples


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.raw += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return render(samples.summary())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_everything_that_the_study_says_is_on_the_page(page: Page) -> None:
    flat = " ".join(page.text.split())
    for section in samples.summary().sections:
        said = [section.title, section.question, section.headline, *section.shows, *section.does_not_show]
        said += [figure.caption for figure in section.figures] + [figure.title for figure in section.figures]
        said += list(section.setup)
        for words in said:
            assert " ".join(words.split()) in flat
    assert "batchnorm study --seeds 5 --out runs/example" in flat
    assert "2.13.0" in flat
    assert "headline.lrs" in flat


def test_the_headline_stands_with_its_spread_and_its_limits(page: Page) -> None:
    flat = " ".join(page.text.split())
    top = flat[: flat.index("What was found")]
    assert "19.6\u00d7 fewer steps to 90% test accuracy" in top
    assert "median of 5 seeds, range 16.9\u201327" in top
    assert "each seed: 16.9 · 18.2 · 19.6 · 22.4 · 27" in top
    assert "654 steps 610\u2013700" in top
    assert "in time the ratio is about 8" in top


def test_a_headline_that_was_not_reached_is_not_a_number() -> None:
    speedup = samples.speedup(
        ratio=samples.spread(12.0, None, None),
        baseline_steps=samples.spread(600.0, None, None),
        bn_steps=samples.spread(30.0, 31.0, 35.0),
        seeds=[0, 1, 2],
    )
    flat = " ".join(Page(render(samples.summary(speedup_90=speedup))).text.split())
    assert "No ratio: 90% test accuracy was not reached by both" in flat
    assert "3 seeds, 12 and up" in flat
    assert "not reached 600 and up" in flat


def test_a_study_without_the_headline_or_without_end_is_a_page_too() -> None:
    summary = samples.summary(speedup_90=None, complete=False, sections=())
    flat = " ".join(Page(render(summary)).text.split())
    assert "This run is not finished" in flat
    assert "fewer steps to" not in flat


def test_every_string_is_escaped(page: Page, text: str) -> None:
    assert "<script>window.attacked" not in text
    assert "{{ 7 * 7 }}" in page.text
    assert not [tag for tag, _ in page.tags if tag == "b"]
    scripts = page.all("script")
    assert [script.get("id") for script in scripts] == [None, "plots", "plotly", None]


def test_nothing_is_fetched(page: Page, text: str) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    own_style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in own_style
    assert "@import" not in own_style
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_the_page_has_what_a_reader_without_eyes_or_mouse_needs(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    charts = [div for div in page.all("div") if (div.get("class") or "").startswith("chart")]
    assert len(charts) == 9
    assert all(chart["role"] == "group" and chart["aria-label"] for chart in charts)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in page.all("a")]
    assert {link[1:] for link in links if link and link.startswith("#")} <= set(ids)
    assert all(button.get("type") == "button" for button in page.all("button"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))


def test_each_plot_has_its_data(page: Page) -> None:
    start = page.raw.index('{"')
    plots, _ = json.JSONDecoder().raw_decode(page.raw, start)
    charts = [div["id"] for div in page.all("div") if (div.get("class") or "").startswith("chart")]
    assert sorted(plots) == sorted(str(chart) for chart in charts)


def test_the_page_is_small_enough_to_send(tmp_path: Path) -> None:
    out = report.build(samples.summary(), tmp_path / "page.html")
    assert out.stat().st_size < 6_000_000


def test_the_page_is_written_beside_and_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.html"
    out.write_text("the old page")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"cannot write .*report\.html: No space left on device"):
            report.build(samples.summary(sections=()), out)
    assert out.read_text() == "the old page"
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
    assert report.build(samples.summary(sections=()), out) == out
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"expected a file for the page, got the folder .*: name a file in it"):
        report.build(samples.summary(sections=()), tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        report.build(samples.summary(sections=()), tmp_path / "missing" / "page.html")


def test_sections_and_figures_of_the_same_name_have_their_own_anchors() -> None:
    part = samples.section("Same name!", samples.lines(), samples.lines())
    page = Page(render(samples.summary(sections=(part, dataclasses.replace(part, name="same NAME")))))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert {"same-name", "same-name-2", "fig-curves", "fig-curves-2"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_without_jinja2_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_jinja(name: str, *rest: Any) -> Any:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(MissingDependencyError, match=r"jinja2.*pip install 'batchnorm\[report\]'"):
        render(samples.summary())


def test_the_verdict_of_a_comparison_stands_on_top() -> None:
    verdict = {
        "text": "batch is better. layer: no difference shown.",
        "judgements": [{"text": "batch is better."}, {"text": "layer: no difference that 3 seeds can show."}],
        "test": "paired differences over seeds",
    }
    summary = samples.summary(kind="comparison", verdict=verdict, speedup_90=None, complete=False)
    flat = " ".join(Page(render(summary)).text.split())
    top = flat[: flat.index("What was found")]
    assert "layer: no difference that 3 seeds can show." in top
    assert "By paired differences over seeds." in top
    assert "batchnorm compare --resume" in top
