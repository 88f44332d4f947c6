"""Still pictures: for paper, and for a reader without JavaScript."""

from __future__ import annotations

import builtins
import dataclasses
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from batchnorm._errors import MissingDependencyError
from batchnorm.report import palette
from batchnorm.report.figures import plot
from batchnorm.report.page import render
from batchnorm.report.stills import still
from report import samples

FIGURES = [
    samples.lines(),
    samples.lines(log_x=True, log_y=True, y_range=None),
    samples.bars(),
    samples.long_bars(),
    samples.points(),
    samples.small_grid(),
    samples.landscapes(),
]


def drawn(figure: Any, name: str = "") -> str:
    made = plot(figure)
    return still(made.figure, made.keys, made.flipped, name)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.kind)
def test_a_still_is_svg_in_the_colours_of_the_page(figure: Any) -> None:
    text = drawn(figure)
    ET.fromstring(text)
    named = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert named <= palette.variables(dark=False).keys()
    shades = {
        key.colour.removeprefix("var(--").removesuffix(")") for key in plot(figure).keys if figure.kind != "heatmap"
    }
    assert shades <= named
    assert "#fe00" not in text
    # A style of its own would reach the whole page.
    assert "<style" not in text
    assert "<script" not in text


def test_a_still_has_the_names_the_axes_and_the_bars_values() -> None:
    text = drawn(samples.bars())
    for words in ("raw", "whitened", "tuned rate", "fixed rate", "preparation of the input", "steps", "43", "never"):
        assert f">{words}<" in text, words


def test_names_keep_their_digits_and_places_do_not() -> None:
    series = samples.lines().series[0]
    pair = tuple(dataclasses.replace(series, name=f"without, rate {rate}") for rate in ("0.25", "0.03125"))
    text = drawn(samples.lines(series=pair))
    assert ">without, rate 0.25<" in text
    assert ">without, rate 0.03125<" in text
    assert not re.search(r' d="[^"]*\.\d\d', text)


def test_powers_of_ten_and_dollars_are_written_as_text() -> None:
    text = drawn(samples.lines(log_x=True, x_label="price in $, in $", y_range=None))
    assert "price in $, in $" in text
    assert "mathdefault" not in text
    assert ">100<" in text


def test_the_same_figure_gives_the_same_bytes_and_two_have_no_id_in_common() -> None:
    assert drawn(samples.points(), "a") == drawn(samples.points(), "a")
    ids = [set(re.findall(r' id="([^"]+)"', drawn(samples.points(), name))) for name in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_every_figure_of_the_page_has_a_still_that_says_what_it_shows() -> None:
    text = render(samples.summary())
    assert len(re.findall(r'<div class="still" role="img" aria-label="[^"]+"><svg', text)) == 7


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*pip install 'batchnorm\[report\]'"):
        drawn(samples.bars())
