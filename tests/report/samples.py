"""Studies made by hand: every kind of figure, gaps, long names and strings that try to be HTML."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from batchnorm.study.document import Cell, Figure, Section, Series, Summary, Table

NASTY = "<script>window.attacked = 1</script> & \"quoted\" 'single' {{ 7 * 7 }} </script> %{y} <b>bold</b>"
LONG = "recalibrated Batch Renormalization with a warm-up of five hundred steps"


def spread(*values: float | None) -> dict[str, Any]:
    ordered = sorted(values, key=lambda value: math.inf if value is None else value)
    return {"median": ordered[len(ordered) // 2], "low": ordered[0], "high": ordered[-1], "values": values}


def speedup(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "ratio": spread(16.9, 18.2, 19.6, 22.4, 27.0),
        "baseline_steps": spread(610, 630, 654, 660, 700),
        "bn_steps": spread(26, 30, 32, 34, 38),
        "baseline_lr": 2.0,
        "bn_lr": 2.0,
        "threshold": 0.9,
        "seeds": 5,
    }
    return data | changes


def lines(**changes: Any) -> Figure:
    x = tuple(float(step) for step in range(0, 2000, 20))
    slow = tuple(0.1 + 0.85 / (1 + math.exp((650 - step) / 90)) for step in x)
    fast = tuple(0.97 - 0.87 * math.exp(-step / 25) for step in x)
    # One seed of the slow arm is missing for a while: the band must break and go on.
    low = tuple(None if 30 <= at < 40 else y - 0.04 for at, y in enumerate(slow))
    figure = Figure(
        id="curves",
        kind="lines",
        title="Test accuracy while the net learns",
        x_label="step",
        y_label="test accuracy",
        series=(
            Series("without normalization", x, slow, low, tuple(y + 0.03 for y in slow), role="none"),
            Series(
                "with batch norm", x, fast, tuple(y - 0.02 for y in fast), tuple(y + 0.01 for y in fast), role="batch"
            ),
            Series("with batch norm, five times the rate", x[::10], fast[::10], role="batch", dash=True),
            Series(
                LONG, x[:50], tuple(None if at % 9 == 0 else y - 0.2 for at, y in enumerate(slow[:50])), role="control"
            ),
        ),
        caption="Median over 5 seeds, the band spans all of them.",
        alt="With batch norm the curve is at 0.9 after 32 steps; without, it stays at chance until step 500.",
        y_range=(0.0, 1.0),
    )
    return dataclasses.replace(figure, **changes)


def bars(**changes: Any) -> Figure:
    names = ("raw", "centred", "standardized", "whitened")
    figure = Figure(
        id="bars",
        kind="bars",
        title="Steps to a train loss of 0.1",
        x_label="preparation of the input",
        y_label="steps",
        series=(
            Series("tuned rate", names, (43.0, 17.0, 6.0, None), (40.0, 15.0, 5.0, None), (46.0, 20.0, 6.0, None)),
            Series("fixed rate", names, (90.0, 31.0, 12.0, 4.0), role="control"),
        ),
        caption="Whitened never arrives at the tuned rate.",
        alt="The more is prepared, the fewer steps: 43, 17, 6.",
    )
    return dataclasses.replace(figure, **changes)


def long_bars() -> Figure:
    names = ("reference: digits, tuned", "untuned, conservative rate", LONG, NASTY, "ReLU with He init")
    return Figure(
        id="long bars",
        kind="bars",
        title="Where the ratio is smaller",
        x_label="case",
        y_label="ratio of steps",
        series=(
            Series(
                "ratio",
                names,
                (19.6, 38.6, 3.5, 2.9, 2.5),
                (16.9, 30.0, 3.0, 2.5, 2.4),
                (27.0, 40.1, 4.0, None, 3.3),
                role="batch",
            ),
        ),
        caption="Each bar is a median over 5 seeds.",
        alt="The ratio is 19.6 in the reference case and 2.5 with ReLU.",
    )


def points() -> Figure:
    angles = [at / 12 for at in range(90)]
    arms = [
        Series(
            name,
            tuple(sign * angle * math.cos(angle) for angle in angles),
            tuple(sign * angle * math.sin(angle) for angle in angles),
            role=role,  # type: ignore[arg-type]
        )
        for name, sign, role in (("first arm", 1, "data-a"), ("second arm", -1, "data-b"))
    ]
    return Figure(
        "spiral", "points", "The spiral", "x", "y", tuple(arms), "Two arms.", "Two arms wound into each other."
    )


def small_grid() -> Figure:
    z = ((0.1, 0.32, 0.97, 0.9), (0.86, 0.95, 0.98, 0.98))
    series = Series("accuracy", (0.001, 0.01, 0.3, 3.0), ("none", "batch"), z=z)  # type: ignore[arg-type]
    return Figure(
        "grid",
        "heatmap",
        "Robustness",
        "init std",
        "net",
        (series,),
        "Each cell a median.",
        "Batch is never below .86.",
    )


def landscapes() -> Figure:
    side = tuple(-6 + at * 12 / 30 for at in range(31))
    grids = tuple(
        Series(name, side, side, z=tuple(tuple(1 / (1 + math.exp(tilt * x - y)) for x in side) for y in side))
        for name, tilt in (("none", 0.2), ("batch", 1.0), ("batch, no gamma or beta", 3.0))
    )
    return Figure(
        "land", "heatmap", "What was learned", "x", "y", (*grids, *points().series), "Shading: output.", "Three areas."
    )


def table(*rows: tuple[Cell, ...]) -> Table:
    return Table(
        "Steps and accuracy, by case",
        ("case", "steps without", "steps with", "ratio", "range", "test accuracy", "learning rate"),
        rows
        or (
            ("reference", 654.0, 32.0, 19.6, "16.9-27.0", 0.977, 2.0),
            ("deep, 6 layers", None, 40.0, None, "never", 0.98, 0.3),
            (LONG, 12345.0, 1.8e-7, 3.0, "2.5-3.3", 0.1, 10.0),
            (NASTY, 1.0, 2.0, 0.5, "", None, 1.0),
        ),
        note="Medians over 5 seeds.",
    )


def section(name: str, *figures: Figure, **changes: Any) -> Section:
    made = Section(
        name=name,
        title=f"About {name}",
        question="How many steps does each net need to 90% test accuracy?",
        headline="With batch norm 32 steps [26, 38], without 654 [610, 700]: 19.6 times fewer.",
        shows=("Batch norm makes this net learn in fewer steps.", "The spread over seeds is small beside the effect."),
        does_not_show=(
            "A step with batch norm costs about twice the time: in time the ratio is about 8.",
            "With a 4 x Xavier init the ratio is 3.5, with ReLU and He init 2.5.",
            "A well initialised net gains no final accuracy.",
        ),
        setup={"net": "3 x 100 sigmoid", "batch": 60, "learning rate": 2.0, "momentum": 0.1, "eps": 1e-5, "data": None},
        figures=figures,
        tables=(table(),),
    )
    return dataclasses.replace(made, **changes)


def summary(**changes: Any) -> Summary:
    made = Summary(
        title="What batch normalization does to a network",
        command="batchnorm study --seeds 5 --out runs/example",
        complete=True,
        seconds=97.3,
        environment={"python": "3.11.7", "torch": "2.13.0", "cores": 2, "processor": NASTY, "gpu": None},
        config={"seed": 0, "headline": {"lrs": [0.3, 1.0, 2.0], "steps": 2000}, "sections": ("headline", "deep")},
        overview=Table(
            "What was found",
            ("Question", "Answer"),
            (
                ("How many steps does each net need?", "32 with batch norm, 654 without: 19.6 times fewer."),
                (
                    "Does a deep sigmoid net train at all?",
                    "Without normalization it stays at chance for 2000 steps; with it, 0.98.",
                ),
            ),
        ),
        sections=(
            section("headline", lines(), long_bars()),
            section(
                "distribution",
                bars(),
                small_grid(),
                title="Preparing the input: centred, standardized, rotated, whitened",
            ),
            section("identity", points(), landscapes()),
            section(
                "Ünïcödé Δμ " + NASTY,
                lines(id=NASTY, title=NASTY, x_label=NASTY, y_label=NASTY, alt=NASTY, caption=NASTY),
                title=NASTY,
            ),
        ),
        speedup_90=speedup(),
    )
    return dataclasses.replace(made, **changes)
