"""The page of a watch's records."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchnorm._errors import OutputError, RecordsError
from batchnorm.report import write_watch_page
from batchnorm.report.looks import layers_of
from batchnorm.report.watch import render
from batchnorm.report.watch_chapters import chapters
from batchnorm.report.watch_figures import DRAWN, chosen
from report.test_browser import CONTRASTS, DESKTOP, PHONE, Visit, browser  # noqa: F401 -- a fixture
from report.test_page import Page
from report.watch_samples import nasty, record, run

pytest.importorskip("plotly")

RUNS = {"one": run, "five": lambda: run(5), "hundred": lambda: run(100, 200), "nasty": nasty}


def figures_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    of = chosen(layers_of(records), {}, 100)
    return {figure.id: figure for chapter in chapters(of) for row in chapter.rows for figure in row}


@pytest.mark.parametrize("name", RUNS)
def test_all_layers_are_on_the_page(name: str) -> None:
    records = RUNS[name]()
    text = render(records, "My run")
    page = Page(text)
    flat = " ".join(page.text.split())
    assert "My run" in flat
    for layer in layers_of(records):
        assert " ".join(layer.title.split()) in flat
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a") if link["href"].startswith("#")} <= set(ids)
    charts = [div for div in page.all("div") if (div.get("class") or "").startswith("chart")]
    assert len(charts) > 5
    assert all(chart["aria-label"] for chart in charts)
    assert "<script>window.attacked" not in text
    assert text == render(json.loads(json.dumps(records)), "My run")


def test_what_stands_out_is_said() -> None:
    flat = " ".join(Page(render(run(3, 600, saturated=0.25, grad_norm=[3e-5, 4e-5]))).text.split())
    assert "looks30, from step 0 to 580" in flat
    assert "numbers belowof the last look, step 580; movement of all" in flat
    assert "Largest mean gap: 0.013 running deviations, channel 1 of layer features.0.norm." in flat
    assert "Variance furthest off: 1.20 times the running one, in layer features.2.norm." in flat
    assert "Most dead units: 12.5% in layer features.0.norm." in flat
    assert "Most saturated values: 25% in layer features.0.norm." in flat
    assert "Gradient norms: from 5.0 \u00d7 10\u207b\u2075 (layer" in flat
    assert "std per 100 steps in layer features." in flat
    assert "Broken" not in flat


def test_nan_is_said_first() -> None:
    records = run(3)
    for item in records:
        if item["step"] >= 120 and item["layer"] != "features.0.norm":
            item["mean"][1] = None
    flat = " ".join(Page(render(records)).text.split())
    assert "BrokenNaN or infinite input, first seen at step 120 in layer features.1.norm; in 2 of 3 layers" in flat


def test_few_layers_are_all_drawn_and_of_many_the_worst_by_each_measure() -> None:
    few = figures_of(run(DRAWN))
    names = [series.name for series in few["ratio"].series]
    assert names[:3] == ["features.5.norm", "features.4.norm", "features.3.norm"]
    assert len(names) == DRAWN
    assert "gap-depth" not in few
    records = run(30)
    for item in records:
        at = int(item["layer"].split(".")[1])
        item["dead"] = 0.9 if at == 3 else 0.0
        item["saturated"] = 0.8 if at == 5 else 0.0
        item["mean_gap"] = [2.0 if at == 7 else 0.1]
        item["grad_norm"] = [1e-9 if at == 11 else 1.0]
    many = figures_of(records)
    drawn = {series.name for series in many["gradient"].series}
    assert len(drawn) == DRAWN
    assert {f"features.{at}.norm" for at in (3, 5, 7, 11, 29)} <= drawn
    assert len(many["gradient-depth"].series[0].z) == 30
    # One colour for a layer on the whole page.
    colours = {(series.name, series.role) for key in ("gap", "ratio", "gradient") for series in many[key].series}
    assert len(colours) == DRAWN


def test_the_lines_hold_what_was_recorded() -> None:
    records = run(1, 400, units=2)
    figures = figures_of(records)
    assert figures["gap"].series[0].x == tuple(float(item["step"]) for item in records)
    assert figures["gap"].series[0].y == pytest.approx([max(item["mean_gap"]) for item in records])
    assert figures["input-0"].series[0].y == pytest.approx([item["typical"][1] for item in records])
    assert figures["input-0"].series[0].low == pytest.approx([item["typical"][0] for item in records])
    assert figures["gamma"].series[0].y == pytest.approx([sum(item["weight"]) / 2 for item in records])
    assert figures["gradient"].series[0].y == pytest.approx([math.sqrt(2) * 0.1] * len(records))
    assert figures["dead"].series[0].y == (0.125,) * len(records)
    # A ratio of 0.5 is as far off as one of 2.
    low = run(1, 400, units=2)
    for item in low:
        item["var_ratio"] = [0.5, 1.0]
    assert figures_of(low)["ratio"].series[0].y == pytest.approx([2.0] * len(low))


def test_the_first_steps_are_left_out_unless_there_is_nothing_else() -> None:
    flat = " ".join(Page(render(run(2, 600))).text.split())
    assert "The first 100 steps are left out" in flat
    flat = " ".join(Page(render(run(2, 100))).text.split())
    assert "So short a run has its first steps counted too" in flat
    assert "How fast the typical unit" in flat
    flat = " ".join(Page(render([record(0)])).text.split())
    assert "Movement per 100 steps" not in flat


def test_many_looks_are_thinned() -> None:
    assert len(figures_of(run(1, 4000, 2, units=2))["gap"].series[0].x) == 400


def test_torch_is_not_needed_to_draw(tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps(run(2)))
    code = (
        "import sys, json; sys.modules['torch'] = None; from batchnorm.report import write_watch_page;"
        "print(write_watch_page(json.load(open('records.json')), 'page.html'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "page.html\n", done.stderr


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert write_watch_page(run(), str(file)) == file
    before = file.read_text()
    assert before.startswith("<!DOCTYPE html>")
    with pytest.raises(RecordsError, match="expected records of a watch, got none"):
        write_watch_page([], file)
    with pytest.raises(OutputError, match="expected a file for the page, got the folder"):
        write_watch_page(run(), tmp_path)
    with pytest.raises(OutputError, match=r"cannot write .*nowhere"):
        write_watch_page(run(), tmp_path / "nowhere" / "page.html")
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]
    assert file.read_text() == before


@pytest.mark.browser
@pytest.mark.parametrize("name", ["one", "hundred", "nasty"])
@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"])
def test_in_a_browser(browser: Any, tmp_path: Path, name: str, size: dict[str, int], scheme: str) -> None:  # noqa: F811
    seen = Visit(browser, write_watch_page(RUNS[name](), tmp_path / "page.html"), size, scheme)
    try:
        assert seen.messages == []
        assert seen.requests == [seen.url]
        assert seen.page.evaluate("window.attacked") is None
        seen.page.eval_on_selector_all("details", "(all) => { for (const item of all) item.open = true; }")
        assert seen.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert seen.page.locator(".failed").count() == 0
        found = seen.page.evaluate(CONTRASTS)
        assert len(found) > 20
        assert [item for item in found if item[0] < 4.5] == []
    finally:
        seen.context.close()
