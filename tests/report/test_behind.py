"""The numbers behind the figures: tables to read, CSV to keep."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from batchnorm.report import behind
from batchnorm.report.page import render
from batchnorm.study.document import Figure, Series
from report import samples

FIGURES = [samples.lines(), samples.bars(), samples.long_bars(), samples.points(), samples.small_grid()]


def unpacked(address: str) -> list[list[str]]:
    """The rows of a link's CSV."""
    head, _, body = address.partition(",")
    if head == "data:application/gzip;base64":
        whole = gzip.decompress(base64.b64decode(body)).decode()
    else:
        assert head == "data:text/csv;charset=utf-8"
        whole = unquote(body)
    return list(csv.reader(io.StringIO(whole)))


def cell(value: Any) -> str:
    return "" if value is None else str(float(f"{value:.6g}")) if isinstance(value, float) else str(value)


@pytest.mark.parametrize("figure", [*FIGURES, samples.landscapes()], ids=lambda figure: figure.id)
def test_the_csv_has_every_number_of_the_figure(figure: Figure) -> None:
    head, *found = unpacked(behind.link(*behind.rows(figure)))
    expected = []
    for series in figure.series:
        if series.z is not None:
            for y, row in zip(series.y, series.z, strict=True):
                expected += [[series.name, cell(x), cell(y), cell(z)] for x, z in zip(series.x, row, strict=True)]
        else:
            for at, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
                ends = [cell(series.low[at] if series.low else None), cell(series.high[at] if series.high else None)]
                expected.append([series.name, cell(x), cell(y), *(ends if "low" in head else [""])])
    assert found == expected
    assert head == ["series", "x", "y", "value"] if figure.kind == "heatmap" else ["series", "x", "y", "low", "high"]


def test_a_table_has_the_value_with_its_spread_beside_it() -> None:
    (table,) = behind.tables(samples.bars())
    assert table.columns == ("preparation of the input", "tuned rate", "fixed rate")
    assert table.rows[0] == ("raw", "43 [40, 46]", "90")
    # Never reached, and no end of the range either.
    assert table.rows[3] == ("whitened", None, "4")


def test_an_open_range_is_said_to_be_open() -> None:
    series = Series("s", ("a", "b"), (3.0, None), (2.0, 5.0), (None, None))
    (table,) = behind.tables(samples.bars(series=(series,)))
    assert [row[1] for row in table.rows] == ["3 [2, open]", "never [5, open]"]


def test_a_long_curve_is_thinned_in_the_table_and_says_so() -> None:
    (table,) = behind.tables(samples.lines())
    assert len(table.rows) == 34
    assert [row[0] for row in table.rows[:2]] == [0.0, 60.0]
    assert table.note.endswith("Every 3rd of 100 rows; the CSV has all.")


def test_each_grid_is_a_table_of_its_own() -> None:
    found = behind.tables(samples.landscapes())
    # Three grids, and the points that lie over them.
    assert [len(table.rows) for table in found] == [16, 16, 16, 36]
    (small,) = behind.tables(samples.small_grid())
    assert small.columns == ("net by init std", "0.001", "0.01", "0.3", "3")
    assert small.rows == (("none", 0.1, 0.32, 0.97, 0.9), ("batch", 0.86, 0.95, 0.98, 0.98))


class Links(HTMLParser):
    """The links that save a file, and which figure each is in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.figure = ""
        self.tables: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "figure":
            self.figure = attributes.get("id") or "table"
        if tag == "table":
            self.tables[self.figure] = self.tables.get(self.figure, 0) + 1
        if tag == "a" and "download" in attributes:
            self.found.setdefault(self.figure, []).append(str(attributes["href"]))


def test_every_figure_and_table_of_the_page_has_its_numbers_behind_it() -> None:
    summary = samples.summary()
    links = Links(render(summary))
    figures = [figure for section in summary.sections for figure in section.figures]
    ids = [name for name in links.found if name != "table"]
    assert len(ids) == len(figures)
    for name, figure in zip(ids, figures, strict=True):
        (address,) = links.found[name]
        assert len(unpacked(address)) == 1 + len(behind.rows(figure)[1])
        assert links.tables[name] == len(behind.tables(figure))
    # The overview and one table a section.
    assert len(links.found["table"]) == 1 + len(summary.sections)
    assert unpacked(links.found["table"][1])[1][:4] == ["reference", "654.0", "32.0", "19.6"]


def test_all_records_are_on_the_page(tmp_path: Path) -> None:
    lines = [
        {"section": "deep", "variant": "none", "seed": 0, "step": step, "metric": name, "value": value, "run": "a"}
        for step, name, value in ((0, "loss", 0.1234567891), (1, "loss", None), (1, "finished", 1))
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = render(samples.summary(), file)
    address = next(
        href
        for hrefs in Links(text).found.values()
        for href in hrefs
        if "gzip" in href[:30] and len(unpacked(href)[0]) == 7
    )
    head, *found = unpacked(address)
    assert head == ["section", "variant", "seed", "step", "metric", "value", "run"]
    # Not rounded: the records are what was measured.
    assert found[0] == ["deep", "none", "0", "0", "loss", "0.1234567891", "a"]
    assert found[1][5] == ""


def test_records_that_are_too_many_are_left_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert behind.records_link(tmp_path / "none.jsonl") is None
    file = tmp_path / "records.jsonl"
    line = {"section": "s", "variant": "v", "seed": 0, "step": 0, "metric": "finished", "value": 1, "run": "r"}
    file.write_text(json.dumps(line) + "\n")
    assert behind.records_link(file) is not None
    monkeypatch.setattr(behind, "_MOST_BYTES", 10)
    assert behind.records_link(file) is None
    assert "The records stand in" in render(samples.summary(sections=()), file)
