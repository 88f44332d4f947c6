"""Which runs a comparison needs, from its configuration and the records so far. No torch.

The learning rate of each variant is searched by successive halving (Jamieson & Talwalkar 2016): every rate for a
quarter of a run, the better half of them to the half, the best two to the end; the best at the end is taken. Then every
variant is trained at its rate, with seeds and orders that the search has not seen. All variants have the same number of
rates and of steps; what the budget buys is worked out once, from the seconds that a step of each variant takes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

from batchnorm._errors import InputError
from batchnorm.study.comparison.settings import CompareConfig, replaced
from batchnorm.study.plan import Plan, Run, run_id
from batchnorm.study.records import Records

FEWEST = 24
"""Steps of a run below which a budget is refused: not much can be said of fewer."""
ENOUGH = 120
DENSE = 8
# What is left for making models, writing files and pages; and the most of a budget that evaluations may take.
_SHARE, _EVALUATIONS = 0.75, 0.35
_COUNTS = (30, 20, 12, DENSE)
# The test part is looked at whenever validation improves, and the grid of evaluations has denser places.
_OFTENER = 1.4
# Of a step, what the forward pass of a batch takes, about.
_FORWARD = 1 / 3
# Of a search's run, the last evaluations that decide, averaged.
_DECIDING = 3


def rungs(count: int, steps: int) -> list[tuple[int, int]]:
    """(number of rates, steps) of each rung of the search over ``count`` rates; none where there is nothing to choose.

    >>> rungs(9, 400)
    [(9, 100), (5, 200), (2, 400)]
    """
    if count < 2:
        return []
    found = [(count, math.ceil(steps / 4)), (math.ceil(count / 2), math.ceil(steps / 2)), (min(2, count), steps)]
    return found if count > 2 else found[2:]


def lengths(config: CompareConfig) -> float:
    """What each variant costs, in runs of full length."""
    return config.seeds + sum(_lengths(rungs(len(config.lrs), 1000))) / 1000


def _lengths(found: Sequence[tuple[int, int]]) -> list[int]:
    """The steps that each rung takes, over all its rates: they go on from where the rung before ended."""
    ends = (0, *(until for _, until in found))
    return [count * (until - start) for (count, until), start in zip(found, ends, strict=False)]


def size(config: CompareConfig, records: Records) -> tuple[int, int]:
    """(steps, evaluations) of a measured run.

    Raises:
        InputError: the budget is too small; the message says what would do.
    """
    timed = records.where(section="calibrate", metric="seconds")
    step, look, start = (sum(line["value"] for line in timed.where(what=w)) for w in ("step", "evaluation", "start"))
    if config.steps:
        # Counted and not timed: the same command is to give the same records, however busy the machine is.
        look = _OFTENER * _FORWARD * config.samples[1] / config.batch_size
        return config.steps, next((n for n in _COUNTS if n * look <= config.steps), DENSE)
    look *= _OFTENER
    # Every run compiles a model of its own; what does not compile has a first step like the others.
    start += sum(line["value"] for line in timed.where(what="first step")) if config.compile else 0.0
    whole = config.budget * _SHARE * config.workers
    runs = config.seeds + sum(count for count, _ in rungs(len(config.lrs), 100))
    share = (whole - start * runs) / lengths(config)
    count = next((n for n in _COUNTS if n * look <= _EVALUATIONS * share), DENSE)
    steps = int((share - count * look) / step) if step else FEWEST
    if steps < FEWEST:
        needed = ((FEWEST * step + DENSE * look) * lengths(config) + start * runs) / (_SHARE * config.workers)
        raise InputError(
            f"a budget of {config.budget:g} s is too small for {FEWEST} steps of a run: with {len(config.variants)} "
            f"variants, {len(config.lrs)} rates and {config.seeds} seeds here it takes {_rounded_up(needed)}; give "
            "that as the budget, or fewer of these"
        )
    return steps, count


def settled(config: CompareConfig, records: Records) -> CompareConfig:
    """The configuration with the rates that are searched: of an automatic grid every second one alone (whole decades),
    where all of them would leave less than ``ENOUGH`` steps to a run."""
    if not config.auto or config.steps or not records.where(section="calibrate", metric="finished").lines:
        return config
    with contextlib.suppress(InputError):
        if size(config, records)[0] >= ENOUGH:
            return config
    return replaced(config, lrs=config.lrs[1::2])


def evaluations(steps: int, count: int) -> tuple[int, ...]:
    """The steps of a run's evaluations: evenly spaced, denser at the beginning, and at the ends of the search's rungs.

    >>> evaluations(16, 4)
    (0, 1, 2, 4, 8, 12, 16)
    """
    even = {round(place * steps / count) for place in range(count + 1)}
    # A variant that is ten times faster than another would be between the first two of an even grid.
    early = {round(steps / (count * 2**power)) for power in range(1, 2 + count // 10)}
    return tuple(sorted(even | (early - {0}) | {math.ceil(steps / 4), math.ceil(steps / 2), steps}))


def plan(config: CompareConfig, records: Records) -> Plan:
    """The runs that are known to be needed, and the seconds that will follow."""
    if not records.where(section="calibrate", metric="finished").lines:
        return Plan(())
    steps, count = size(config, records)
    at = evaluations(steps, count)
    seconds = _seconds(config, records, len(at) / steps)
    runs: list[Run] = []
    ladder = rungs(len(config.lrs), steps)
    chosen: dict[str, float] = {}
    done = records.finished()
    later = 0.0
    for variant in config.variants:
        cost = seconds[variant]
        left = list(config.lrs)
        after = 0
        for number, (keep, until) in enumerate(ladder):
            if number:
                left = ranked(config, records, variant, number - 1)[:keep]
            wave = [_search(config, variant, lr, number, after, until, at, cost) for lr in sorted(left)]
            runs += wave
            after = until
            if not done.issuperset(run.id for run in wave):
                later += cost * sum(_lengths(ladder)[number + 1 :])
                break
        else:
            chosen[variant] = best(config, records, variant)
        later += 0 if variant in chosen else config.seeds * steps * cost
    measured = [
        _measure(variant, chosen[variant], seed, steps, at, seconds[variant])
        for seed in range(config.seed, config.seed + config.seeds)
        for variant in config.variants
        if variant in chosen
    ]
    return Plan((*runs, *measured), later)


def complete(config: CompareConfig, records: Records) -> bool:
    """Whether every run is finished."""
    wanted = plan(config, records)
    return bool(wanted.runs) and not wanted.later and records.finished().issuperset(run.id for run in wanted.runs)


def scores(
    config: CompareConfig, records: Records, variant: str, rung: int, metric: str = "validation"
) -> dict[float, float | None]:
    """By rate, what a rung of the search came to: the mean of its last validations; None where it diverged."""
    found: dict[float, float | None] = {}
    lines = records.where(section="search", variant=variant, rung=rung)
    for lr in config.lrs:
        own = lines.where(lr=lr)
        if not own.lines:
            continue
        curve = [value for _, value in own.curve(metric)] if own.value("diverged") is None else []
        last = curve[-_DECIDING:]
        found[lr] = None if not last else sum(last) / len(last)
    return found


def ranked(config: CompareConfig, records: Records, variant: str, rung: int) -> list[float]:
    """The rates of a rung, the best first; of equals that of the smaller validation loss, then the smaller one."""
    sign = 1 if config.higher else -1
    losses = scores(config, records, variant, rung, "validation_loss")

    def key(item: tuple[float, float | None]) -> tuple[float, float, float]:
        lr, score = item
        loss = losses.get(lr)
        return (math.inf if score is None else -sign * score, math.inf if loss is None else loss, lr)

    return [lr for lr, _ in sorted(scores(config, records, variant, rung).items(), key=key)]


def best(config: CompareConfig, records: Records, variant: str) -> float:
    """The rate that the search found; the only one where there is no choice."""
    count = len(rungs(len(config.lrs), 100))
    return ranked(config, records, variant, count - 1)[0] if count else config.lrs[0]


def _seconds(config: CompareConfig, records: Records, looks: float) -> dict[str, float]:
    timed = records.where(section="calibrate", metric="seconds")
    return {
        name: timed.where(variant=name, what="step").value("seconds", 0.0)
        + looks * timed.where(variant=name, what="evaluation").value("seconds", 0.0)
        for name in config.variants
    }


def _search(
    config: CompareConfig,
    variant: str,
    lr: float,
    rung: int,
    after: int,
    until: int,
    at: Sequence[int],
    cost: float,
) -> Run:
    name = run_id("search", variant, lr=lr, rung=rung, seed=config.search_seed)
    params = {"lr": lr, "after": after, "at": tuple(step for step in at if step <= until), "test": False}
    labels = {"lr": lr, "rung": rung}
    return Run(name, "search", variant, config.search_seed, until, cost * (until - after), params, labels)


def _measure(variant: str, lr: float, seed: int, steps: int, at: Sequence[int], cost: float) -> Run:
    name = run_id("measure", variant, lr=lr, seed=seed)
    params = {"lr": lr, "after": 0, "at": tuple(at), "test": True}
    return Run(name, "measure", variant, seed, steps, cost * steps, params, {"lr": lr})


def _rounded_up(seconds: float) -> str:
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 7200 else f"{math.ceil(seconds / 3600)} h"
