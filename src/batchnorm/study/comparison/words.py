"""A verdict in words. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchnorm.study.comparison.intervals import Interval
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.wording import short

if TYPE_CHECKING:
    from batchnorm.study.comparison.verdict import Judgement


def told(config: CompareConfig, found: Judgement, seeds: int, mark: float | None, complete: bool) -> str:
    """A judgement over so many seeds, in a few sentences."""
    so_far = "" if complete or not seeds else "So far: "
    measured = found.difference is not None and found.kind != "diverged"
    speed = f" {_speed(found, seeds, mark, config)}" if measured else ""
    return f"{so_far}{quality(config, found, seeds)}{speed}".strip()


def quality(config: CompareConfig, found: Judgement, seeds: int) -> str:
    """What a judgement says of the metric, in a sentence."""
    name, other = found.variant, found.reference
    many = f"{seeds} seed" + ("" if seeds == 1 else "s")
    if found.kind == "not finished":
        return f"{name} against {other}: nothing is measured yet."
    if found.kind == "diverged" or found.difference is None:
        return f"{name} against {other}: no comparison, a run of one of them diverged at the rate it was given."
    difference = amount(config, found.difference)
    what = f"test {config.metric}"
    if found.kind == "one seed":
        return f"{name}: {what} {difference} against {other}; one seed shows no uncertainty, so this is no verdict."
    if found.kind == "no difference shown":
        values = found.difference.values
        agree = all(item > 0 for item in values) or all(item < 0 for item in values)
        more = "; all of them point one way, so that more seeds may show one" if agree else ""
        return f"{name}: no difference in {what} from {other} that {many} can show ({difference}){more}."
    return f"{name} is {found.kind} than {other} in {what}: {difference} over {many}."


def _speed(found: Judgement, seeds: int, mark: float | None, config: CompareConfig) -> str:
    cost = "" if found.cost is None else f"A step takes {short(found.cost)} times as long"
    cost += "" if found.memory is None or not cost else f" and {short(found.memory)} times the memory"
    cost += "." if cost else ""
    if mark is None:
        return f"{found.reference} learned nothing that steps could be counted to. {cost}"
    where = f"validation {config.metric} {value(config, mark)}"
    if found.steps is None:
        came = f"{found.reached[0]} of {seeds} of its runs, {found.reached[1]} of {found.reference}'s"
        return f"To {where} came {came}. {cost}"
    ratio, time = found.steps, found.time
    if ratio.low is None or ratio.high is None:
        told = f"It reaches {where} in {short(ratio.mean)} times fewer steps"
    elif ratio.low > 1:
        told = f"It reaches {where} in {span(ratio)} times fewer steps"
    elif ratio.high < 1:
        slower = Interval(1 / ratio.mean, 1 / ratio.high, 1 / ratio.low, ())
        told = f"It needs {span(slower)} times more steps to {where}"
    else:
        told = f"No difference in steps to {where} is shown (ratio {span(ratio)})"
    clock = "" if time is None else f"; by the clock the ratio is {short(time.mean)}"
    return f"{told[0].upper()}{told[1:]}{clock}. {cost}"


def amount(config: CompareConfig, found: Interval) -> str:
    """A difference with its interval: ``+2.2 points [+0.9, +3.5]`` of accuracy."""
    points = config.metric in ("accuracy", "balanced-accuracy")
    factor = 100 if points else 1

    def one(number: float) -> str:
        # Few seeds give intervals that are wider than what there is.
        return f"{factor * min(max(number, -1.0), 1.0):+.1f}" if points else f"{number:+.3g}"

    unit = " points" if points else ""
    if found.low is None or found.high is None:
        return f"{one(found.mean)}{unit}"
    return f"{one(found.mean)}{unit} [{one(found.low)}, {one(found.high)}]"


def value(config: CompareConfig, number: float | None) -> str:
    """A value of the metric."""
    if number is None:
        return "none"
    return f"{100 * number:.1f}%" if config.metric in ("accuracy", "balanced-accuracy") else f"{number:.4g}"


def span(found: Interval) -> str:
    """``3.1 [2.0, 4.8]``."""
    return f"{_ratio_text(found.mean)} [{_ratio_text(found.low)}, {_ratio_text(found.high)}]"


def _ratio_text(ratio: float | None) -> str:
    """Two seeds make intervals over many orders of magnitude, of which no digit says anything."""
    if ratio is not None and not 0.01 <= ratio <= 1000:
        return "below 0.01" if ratio < 1 else "above 1000"
    return short(ratio)
