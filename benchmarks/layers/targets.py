"""What the layers ought to reach, beside what was measured. A record, never an assertion of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.layers.cases import ADD, BN, CONTIGUOUS, LAST, RELU

Row = dict[str, Any]
DEFAULT, WARM = "default malloc", "warm heap"


def ratio(row: Row, over: str = "torch", of: str = "ours") -> float | None:
    """How many times longer ``over`` takes than ``of``; None where one was not measured."""
    seconds = row["seconds"]
    return seconds[over]["median"] / seconds[of]["median"] if over in seconds and of in seconds else None


def targets(rows: list[Row]) -> list[Row]:
    """For each target: the worst case measured, where that was, and whether it is met."""
    found = []

    def target(
        what: str, wanted: float, measured: Callable[[Row], float | None], at_most: bool = False, **where: str
    ) -> None:
        values = [
            (value, row)
            for row in rows
            if all(row[key] == wish for key, wish in where.items()) and (value := measured(row)) is not None
        ]
        if not values:
            return
        worst, row = (max if at_most else min)(values, key=lambda pair: pair[0])
        met = sum(value <= wanted if at_most else value >= wanted for value, _ in values)
        found.append(
            {
                "target": what,
                "wanted": f"{'<=' if at_most else '>='} {wanted:g}",
                "worst": worst,
                "at": f"{row['shape']} {row['layout']}" + ("" if "regime" in where else f", {row['regime']}"),
                "met": "yes" if met == len(values) else f"no: {met} of {len(values)}",
            }
        )

    conv = (
        (RELU, WARM, 3.5, 2.2),
        (RELU, DEFAULT, 5.0, 4.5),
        (BN, WARM, 2.5, 1.5),
        (ADD, WARM, 3.0, 2.2),
    )
    for layer, regime, *wanted in conv:
        for layout, least in zip((CONTIGUOUS, LAST), wanted, strict=True):
            target(f"{layer}, {layout}, {regime}", least, ratio, part="conv", layer=layer, layout=layout, regime=regime)
    for layout, most in ((CONTIGUOUS, 1.5), (LAST, 1.6)):
        where = {"part": "conv", "layer": RELU, "layout": layout, "regime": WARM}
        target(f"{RELU} over the floor, {layout}", most, _over_floor, at_most=True, **where)
    target("128x512x7x7 over the floor", 2.0, _over_floor, at_most=True, part="7x7", regime=WARM)
    for part, what, least in (
        ("4096x1024", "4096x1024", 2.0),
        ("tiny", "tiny, torch's module + ReLU", 1.0),
        ("bfloat16", "bfloat16", 2.0),
        ("inference", "inference, BN+ReLU", 1.5),
        ("sweep", "random shapes", 1.0),
    ):
        target(what, least, ratio, part=part)
    target("ghost batches, against plain", 1.2, lambda row: ratio(row, "ghost"), at_most=True, part="family")
    target("a fifth masked, against plain", 1.3, lambda row: ratio(row, "masked"), at_most=True, part="family")
    for layout in ("nhwc", "blocked"):
        target(f"oneDNN {layout}", 1.0, lambda row, peer=f"oneDNN {layout}": ratio(row, peer))
    target("torch in place", 1.0, lambda row: ratio(row, "torch in place"))
    target("torch, compiled", 1.0, lambda row: ratio(row, "torch compiled"))
    target("ours compiled, against ours eager", 1.0, lambda row: ratio(row, "ours", of="ours compiled"))
    return found


def _over_floor(row: Row) -> float | None:
    return ratio(row, "ours", of="floor")
