from __future__ import annotations

import itertools
import re

import pytest

from batchnorm.report import palette
from batchnorm.report.figures import plot
from batchnorm.study.document import Series
from report import samples


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("ground", ["bg", "surface", "sunken"])
@pytest.mark.parametrize("text", ["ink", "muted", "accent", "good", "caution"])
def test_text_is_readable_on_every_ground(dark: bool, ground: str, text: str) -> None:
    colours = palette.variables(dark)
    assert contrast(colours[text], colours[ground]) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("role", sorted(palette.ROLES))
def test_lines_and_bars_stand_out(dark: bool, role: str) -> None:
    colours = palette.variables(dark)
    for index in range(len(palette.ROLES[role])):
        assert contrast(colours[f"{role}-{index}"], colours["surface"]) >= 3


def test_every_role_of_the_document_has_colours_and_shades_go_round() -> None:
    assert set(palette.ROLES) == {"none", "batch", "control", "other", "data-a", "data-b"}
    assert palette.shade("batch", 0) == "var(--batch-0)"
    assert palette.shade("batch", len(palette.ROLES["batch"])) == "var(--batch-0)"
    assert palette.band(palette.shade("none", 1)) == "var(--none-1-band)"


def test_both_themes_have_the_same_names_and_other_colours() -> None:
    light, dark = palette.variables(False), palette.variables(True)
    assert light.keys() == dark.keys()
    assert all(light[name] != dark[name] for name in light)
    assert all(re.fullmatch(r"#[0-9a-f]{6}|rgba\(\d+, \d+, \d+, 0\.\d+\)", colour) for colour in light.values())


def test_eight_other_series_have_a_colour_and_a_dash_of_their_own_pair() -> None:
    names = ("renorm", "ghost", "group", "layer", "instance", "iternorm", "frozen", "sync")
    series = tuple(Series(name, (0.0, 1.0), (1.0, 2.0)) for name in names)
    keys = plot(samples.lines(series=series)).keys
    assert len({key.colour for key in keys}) == 8
    assert all(before.dash != after.dash for before, after in itertools.pairwise(keys))
