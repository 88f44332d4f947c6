"""Two runs on one page."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchnorm import report
from batchnorm._errors import OutputError, RecordsError
from batchnorm.cli.report import report as command
from batchnorm.report import pair
from batchnorm.report.pair import Run, Value, chance, overlaid, render, values_of
from batchnorm.study.document import Figure, Summary
from report import samples


def changed(figure: Figure, factor: float) -> Figure:
    """The figure with the first series' values and ranges ``factor`` times as large."""
    first, *rest = figure.series

    def times(values: Any) -> Any:
        return values and tuple(None if value is None else factor * value for value in values)

    scaled = dataclasses.replace(first, y=times(first.y), low=times(first.low), high=times(first.high))
    return dataclasses.replace(figure, series=(scaled, *rest))


def other() -> Summary:
    """A second run: another seed, another torch, one figure far off."""
    section = samples.section("distribution", changed(samples.bars(), 10.0), samples.small_grid())
    return samples.summary(
        config={"seed": 7, "headline": {"lrs": [0.3, 1.0, 2.0], "steps": 2000}, "sections": ("headline", "deep")},
        environment={**samples.summary().environment, "torch": "2.14.0"},
        command="batchnorm study --seed 7",
        sections=(samples.section("headline", samples.lines(), samples.long_bars()), section),
        speedup_90=samples.speedup(bn_steps=samples.spread(50, 52, 55, 60, 61)),
    )


@pytest.fixture(scope="module")
def text() -> str:
    return render(Run("before", samples.summary()), Run("after", other()))


def test_ranges_that_overlap_are_seed_noise_and_others_are_not() -> None:
    def judged(first: Any, second: Any) -> str:
        return Value("", "", 0, first, second).judgement

    assert judged((2.0, 1.0, 3.0), (3.5, 3.0, 4.0)) == "within seed noise"
    assert judged((2.0, 1.0, 3.0), (3.5, 3.1, 4.0)) == "apart"
    assert judged((3.5, 3.1, 4.0), (2.0, 1.0, 3.0)) == "apart"
    assert judged((2.0, 1.0, 3.0), (2.0, 1.0, 3.0)) == "the same"
    assert judged((2.0, None, None), (3.0, 1.0, 4.0)) == "no spread"
    # A seed that never arrived: the range is open above.
    assert judged((None, 5.0, None), (3.0, 1.0, 4.0)) == "apart"
    assert judged((None, 3.0, None), (9.0, 8.0, 9.0)) == "within seed noise"


def test_how_often_ranges_lie_apart_by_chance() -> None:
    assert chance(3, 3) == pytest.approx(0.1)
    assert chance(1, 1) == 1.0
    assert chance(5, 5) == pytest.approx(2 * 120 * 120 / 3628800)


def test_numbers_are_paired_by_series_and_place() -> None:
    second = dataclasses.replace(samples.bars(), series=samples.bars().series[:1])
    found = list(values_of(samples.bars(), second))
    assert [(value.series, value.place) for value in found] == [
        ("tuned rate", name) for name in ("raw", "centred", "standardized", "whitened")
    ]
    assert found[0].first == (43.0, 40.0, 46.0)


def test_a_number_that_neither_has_is_called_what_its_series_calls_it() -> None:
    bars = samples.bars()
    series = (dataclasses.replace(bars.series[0], missing="none"), *bars.series[1:])
    section = samples.section("distribution", dataclasses.replace(bars, series=series), samples.small_grid())
    summary = samples.summary(sections=(samples.section("headline", samples.lines()), section))
    page = html.unescape(render(Run("before", summary), Run("after", summary)))
    row = re.search(r"whitened, tuned rate.*?</tr>", page, re.DOTALL)
    assert row is not None
    assert re.findall(r">\s*(none|never)\s*<", row[0]) == ["none", "none"]


def test_both_figures_become_one_with_the_second_dashed() -> None:
    both = overlaid(samples.bars(), changed(samples.bars(), 2.0), ("before", "after"))
    assert [(series.name, series.dash) for series in both.series] == [
        ("tuned rate, before", False),
        ("tuned rate, after", True),
        ("fixed rate, before", False),
        ("fixed rate, after", True),
    ]
    grids = overlaid(samples.landscapes(), samples.landscapes(), ("before", "after"))
    # Two grids of each, and the data that lies over them once.
    assert len(grids.series) == 8


def test_the_page_says_what_differs_and_what_is_noise(text: str) -> None:
    flat = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text[text.index("<main>") :])).split())
    config = flat[flat.index("Configuration: what differs") :]
    assert config.startswith("Configuration: what differs name before after seed 0 7")
    assert "torch 2.13.0 2.14.0" in flat
    assert "steps with batch norm 32 [26, 38] 52 [50, 61]" not in flat
    assert "steps with batch norm 32 [26, 38] 55 [50, 61] apart" in flat
    assert "steps without 654 [610, 700] 654 [610, 700] the same" in flat
    assert "Steps to a train loss of 0.1: raw, tuned rate 43 [40, 46] 430 [400, 460] apart" in flat
    assert "Within seed noise means that the ranges over seeds overlap" in flat
    assert "batchnorm study --seed 7" in flat
    # Sections of one run alone are named, not compared.
    assert "About identity (before alone)" in flat


def test_the_pages_figures_have_stills_and_numbers_like_any(text: str) -> None:
    assert text.count('<div class="still" role="img"') == 4
    assert text.count('<details class="data">') == 4
    assert len(text) < 6_000_000


def test_two_runs_of_one_name_are_told_apart() -> None:
    text = render(Run("run", samples.summary()), Run("run", other()))
    assert '<h1 id="title">first and second</h1>' in text


def test_runs_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(
        RecordsError, match=r"expected two runs with a section in common, got .*: choose runs of the same"
    ):
        render(Run("a", samples.summary()), Run("b", samples.summary(sections=(samples.section("alone"),))))


def test_the_command_takes_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summaries = {"a": samples.summary(), "b": other()}
    monkeypatch.setattr(pair, "summary_of", lambda folder: summaries[folder.name])
    for name in summaries:
        (tmp_path / name).mkdir()
    result = CliRunner().invoke(command, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    page = tmp_path / "b" / "comparison.html"
    assert result.output == f"{page}\n"
    assert "<title>a and b</title>" in page.read_text()
    with pytest.raises(OutputError, match="expected a file for the page, got the folder"):
        report.write_pair_page(tmp_path / "a", tmp_path / "b", tmp_path)
