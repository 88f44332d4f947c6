from __future__ import annotations

import pytest

from batchnorm.report.numbers import column, duration, is_numeric, number, plain, spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (654.0, "654"),
        (12345, "12,345"),
        (19.61, "19.6"),
        (2.074, "2.07"),
        (0.97731, "0.977"),
        (-0.5, "-0.500"),
        (0.0, "0"),
        (1.8e-7, "1.8 \u00d7 10\u207b\u2077"),
        (-3.1e7 - 0.5, "-3.1 \u00d7 10\u2077"),
    ],
)
def test_a_number_has_about_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_column_keeps_short_decimals_and_aligns_them() -> None:
    assert column([0.3, 1.0, 10.0]) == ["0.3", "1.0", "10.0"]
    assert column([0.98, 0.977]) == ["0.980", "0.977"]
    assert column([654.0, None, 12345.0]) == ["654", "\u2013", "12,345"]
    # 31.36 would be four digits: each number then has its own three.
    assert column([31.36, 9.25]) == ["31.4", "9.25"]
    assert column([1, "a", None, True]) == ["1", "a", "\u2013", "yes"]
    assert column([]) == []


def test_a_setting_is_shown_as_it_was_set() -> None:
    assert [plain(value) for value in (0.1, 2.0, 1e-05, 123456789.25, None, False, "x")] == [
        "0.1",
        "2",
        "1e-05",
        "123456789.25",
        "\u2013",
        "no",
        "x",
    ]


def test_a_spread_is_open_above_where_a_seed_never_arrived() -> None:
    assert spread({"low": 16.9, "high": 27.0}) == "16.9\u201327"
    assert spread({"low": 16.9, "high": None}) == "16.9 and up"
    assert spread({"low": None, "high": None}) == "no seed arrived"


def test_durations() -> None:
    assert [duration(value) for value in (9.31, 59.6, 107.9, 3780)] == [
        "9.3 s",
        "1 min 00 s",
        "1 min 48 s",
        "1 h 03 min",
    ]


def test_what_is_set_flush_right() -> None:
    assert is_numeric([1.0, None, "654 [600, 700]", "> 2000"])
    assert not is_numeric([1.0, "never"])
    assert not is_numeric([None, ""])
    assert not is_numeric([True])
