from __future__ import annotations

import builtins
import dataclasses
import json
from typing import Any

import pytest

from batchnorm._errors import MissingDependencyError
from batchnorm.report.figures import peers, plot
from batchnorm.report.traces import Key, line
from batchnorm.study.document import Series
from report import samples


def traces(figure: Any, **meta: Any) -> list[dict[str, Any]]:
    (panel,) = plot(figure).panels
    return [trace for trace in panel.data if all(trace["meta"].get(key) == value for key, value in meta.items())]


def test_lines_keep_their_values_their_gaps_and_the_colour_of_their_role() -> None:
    figure = samples.lines()
    drawn = traces(figure, band=False)
    assert [trace["line"]["color"] for trace in drawn] == [
        "var(--none-0)",
        "var(--batch-0)",
        "var(--batch-1)",
        "var(--control-0)",
    ]
    assert [trace["line"]["dash"] for trace in drawn] == ["solid", "solid", "dash", "solid"]
    assert list(drawn[3]["y"])[:2] == [None, pytest.approx(figure.series[3].y[1], rel=1e-5)]
    assert list(drawn[0]["customdata"][0]) == ["0.101", " (0.061 \u2013 0.131)"]


def test_the_band_is_parted_where_a_seed_is_missing_and_lies_below_all_lines() -> None:
    figure = samples.lines()
    (panel,) = plot(figure).panels
    kinds = [trace["meta"]["band"] for trace in panel.data]
    assert kinds == sorted(kinds, reverse=True)
    (band,) = traces(figure, band=True, series=0)
    assert band["fillcolor"] == "var(--none-0-band)"
    gap = list(band["x"]).index(None)
    # Up to the gap: 30 steps along the top and the same 30 back along the bottom.
    assert gap == 60
    assert band["y"][gap] is None
    assert band["x"][0] == band["x"][gap - 1] == 0.0
    assert band["y"][0] > band["y"][gap - 1]


def test_a_third_series_of_a_role_with_two_shades_is_told_apart_by_its_dash() -> None:
    x, y = (0.0, 1.0, 2.0), (1.0, 2.0, 3.0)
    series = tuple(Series(f"s{at}", x, y, role="data-a") for at in range(3))
    keys = plot(samples.lines(series=series)).legend
    assert [(key.colour, key.dash) for key in keys] == [
        ("var(--data-a-0)", "solid"),
        ("var(--data-a-1)", "solid"),
        ("var(--data-a-0)", "dot"),
    ]


def test_a_bar_that_never_arrived_says_so() -> None:
    figure = samples.bars()
    (bar,) = traces(figure, series=0, band=False)
    (text,) = traces(figure, series=0, band=True)
    assert list(bar["y"]) == [43.0, 17.0, 6.0, None]
    assert list(bar["error_y"]["array"]) == [3.0, 3.0, 0.0, 0]
    assert list(bar["error_y"]["arrayminus"]) == [3.0, 2.0, 1.0, 0]
    assert [label.strip() for label in text["text"]] == ["43", "17", "6", "never"]
    # Above the whisker, not in it.
    assert list(text["y"]) == [46.0, 20.0, 6.0, 0]


def test_a_bar_that_cannot_have_a_value_says_why() -> None:
    figure = samples.bars()
    other = dataclasses.replace(figure.series[0], missing="none")
    (text,) = traces(dataclasses.replace(figure, series=(other,)), series=0, band=True)
    assert [label.strip() for label in text["text"]][3] == "none"


def test_bars_with_long_names_lie_down_and_names_are_shortened() -> None:
    result = plot(samples.long_bars())
    (panel,) = result.panels
    bar = next(trace for trace in panel.data if trace["type"] == "bar")
    assert result.flipped
    assert bar["orientation"] == "h"
    assert list(bar["x"]) == [19.6, 38.6, 3.5, 2.9, 2.5]
    labels = panel.layout["yaxis"]["ticktext"]
    assert labels[2].endswith("\u2026")
    assert all(label.count("<br>") <= 2 for label in labels)
    assert result.height is not None
    assert result.height > 5 * 50
    assert not plot(samples.bars()).flipped


def test_text_cannot_become_markup_in_a_plot() -> None:
    (panel,) = plot(samples.long_bars()).panels
    for text in (*panel.layout["yaxis"]["ticktext"], *panel.layout["yaxis"]["tickvals"]):
        assert "<script" not in text
        assert "<b>" not in text
    assert any("&lt;script&gt;" in text for text in panel.layout["yaxis"]["tickvals"])


def test_axes_follow_the_figure() -> None:
    (panel,) = plot(samples.lines(log_x=True, log_y=True, y_range=(0.01, 1.0))).panels
    assert panel.layout["xaxis"]["type"] == panel.layout["yaxis"]["type"] == "log"
    assert list(panel.layout["yaxis"]["range"]) == [-2.0, 0.0]
    assert panel.layout["xaxis"]["dtick"] == 1
    (panel,) = plot(samples.lines()).panels
    assert list(panel.layout["yaxis"]["range"]) == [0.0, 1.0]


def test_bars_that_are_numbers_stand_by_size() -> None:
    bars = dataclasses.replace(samples.bars().series[0], y=(1.0, 2.0), low=None, high=None)
    series = tuple(dataclasses.replace(bars, name=name, x=x) for name, x in (("a", ("2", "10")), ("b", ("0.3", "2"))))
    (panel,) = plot(dataclasses.replace(samples.bars(), series=series)).panels
    assert list(panel.layout["xaxis"]["categoryarray"]) == ["0.3", "2", "10"]
    (panel,) = plot(samples.bars()).panels
    assert list(panel.layout["xaxis"]["categoryarray"]) == ["raw", "centred", "standardized", "whitened"]


def test_a_small_grid_is_a_table_with_its_numbers() -> None:
    result = plot(samples.small_grid())
    (panel,) = result.panels
    (grid,) = panel.data
    assert list(grid["x"]) == ["0.001", "0.01", "0.3", "3"]
    assert grid["texttemplate"] == "%{z:.3~g}"
    assert panel.layout["xaxis"]["type"] == "category"
    assert result.legend == ()


def test_several_grids_stand_side_by_side_on_one_scale_with_the_data_over_each() -> None:
    result = plot(samples.landscapes())
    assert [panel.title for panel in result.panels] == ["none", "batch", "batch, no gamma or beta"]
    ranges = {(panel.data[0]["zmin"], panel.data[0]["zmax"]) for panel in result.panels}
    assert len(ranges) == 1
    assert result.scale == ("0", "1")
    assert [key.name for key in result.legend] == ["first arm", "second arm"]
    assert all([trace["type"] for trace in panel.data] == ["heatmap", "scatter", "scatter"] for panel in result.panels)
    assert all(panel.layout["yaxis"]["scaleanchor"] == "x" for panel in result.panels)


def test_plotly_adds_no_template_of_its_own() -> None:
    for figure in (samples.lines(), samples.bars(), samples.points(), samples.small_grid()):
        for panel in plot(figure).panels:
            assert len(json.dumps(panel.layout["template"])) < 100


def test_a_series_with_whiskers_but_without_upper_end_is_drawn() -> None:
    series = Series("s", (1.0, 2.0), (3.0, None), low=(2.0, None), high=(None, None))
    figure = dataclasses.replace(samples.points(), series=(series,))
    (trace,) = plot(figure).panels[0].data
    assert list(trace["error_y"]["array"]) == [0, 0]
    assert [list(text) for text in trace["customdata"]] == [["3", " (2 \u2013 never)"], ["", ""]]


def test_without_plotly_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_plotly(name: str, *rest: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_plotly)
    with pytest.raises(MissingDependencyError, match=r"plotly.*pip install 'batchnorm\[report\]'"):
        plot(samples.lines())


def test_figures_that_differ_in_one_word_stand_together_on_one_scale() -> None:
    low = samples.lines(title="Input of a unit: without", y_range=None)
    raised = dataclasses.replace(low.series[1], y=tuple(10.0 for _ in low.series[1].y))
    high = samples.lines(title="Input of a unit: BN", y_range=None, series=(raised,))
    other = samples.lines(title="Something else")
    groups = peers([other, low, high, other])
    assert groups == [[other], [low, high], [other]]
    ranges = [list(plot(figure, groups[1]).panels[0].layout["yaxis"]["range"]) for figure in (low, high)]
    assert ranges[0] == ranges[1]
    assert ranges[0][0] < -0.1
    assert ranges[0][1] > 10
    # Alone, each has its own.
    assert "range" not in plot(low).panels[0].layout["yaxis"]


def test_grids_that_stand_together_share_their_colours() -> None:
    grid = samples.small_grid().series[0]
    first = dataclasses.replace(samples.small_grid(), title="Robustness: none")
    brighter = dataclasses.replace(grid, z=((0.5, 2.0, 0.97, 0.9), (0.86, 0.95, 0.98, 0.98)))
    second = dataclasses.replace(first, title="Robustness: batch", series=(brighter,))
    (group,) = peers([first, second])
    ends = [(panel.data[0]["zmin"], panel.data[0]["zmax"]) for item in group for panel in plot(item, group).panels]
    assert ends == [(0.1, 2.0), (0.1, 2.0)]


@pytest.mark.parametrize(("points", "mode"), [(1, "lines+markers"), (2, "lines"), (3, "lines+markers"), (500, "lines")])
def test_a_single_point_is_seen_though_it_is_no_line(points: int, mode: str) -> None:
    xs = tuple(float(at) for at in range(points))
    (drawn,) = line(Series("layer", xs, xs), Key(0, "layer", "#000000", "circle", "solid"))
    assert drawn["mode"] == mode
