"""The sections of a comparison's page on what was measured: curves, rates, cost. Every number is from the records."""

from __future__ import annotations

from batchnorm.study.comparison import planning
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.comparison.verdict import MARK, Verdict, arrivals, by_seed, memory, step_seconds
from batchnorm.study.comparison.words import value
from batchnorm.study.document import Cell, Figure, Section, Series, Table
from batchnorm.study.measures import Curve, spread
from batchnorm.study.records import Records
from batchnorm.study.wording import Role, band, listed, ranged, rounded, short


def role(name: str) -> Role:
    """Colours: without normalization, batch norm, and the rest."""
    kind = name.partition("=")[0]
    return "none" if kind == "none" else "batch" if kind in ("batch", "torch") else "other"


def curves_section(config: CompareConfig, found: Records, verdict: Verdict) -> Section | None:
    """How validation goes over steps and over time."""
    measured = found.where(section="measure")
    over_steps: list[Series] = []
    over_time: list[Series] = []
    for name in config.variants:
        curves: list[Curve] = [
            [(step, item) for step, item in run.curve("validation") if item is not None]
            for run in by_seed(measured, name).values()
        ]
        curves = [curve for curve in curves if curve]
        seconds = step_seconds(found, name)
        if not curves:
            continue
        line = band(name, curves, role(name))
        over_steps.append(line)
        if seconds:
            over_time.append(
                Series(
                    name,
                    tuple(rounded(float(step) * seconds) or 0.0 for step in line.x),
                    line.y,
                    line.low,
                    line.high,
                    role=line.role,
                )
            )
    if not over_steps:
        return None
    rows = []
    for name in config.variants:
        came = spread(list(arrivals(config, by_seed(measured, name), verdict.mark).values()))
        seconds = step_seconds(found, name)
        time = None if came.median is None or not seconds else rounded(came.median * seconds)
        rows.append((name, ranged(came) if came.values else None, time))
    label = f"validation {config.metric}"
    words = [f"{line.name} from {_number(line.y[0])} to {_number(line.y[-1])}" for line in over_steps]
    return Section(
        "curves",
        "Learning curves",
        "How do they learn, over steps and over time?",
        f"Validation {config.metric}, median over seeds: {listed(words)}.",
        (
            f"The mark is {value(config, verdict.mark)}: {MARK:.0%} of the way that {config.reference} makes from its "
            "first validation to its best, reached when two in a row are there.",
        )
        if verdict.mark is not None
        else (f"{config.reference} makes no way that a mark could be set on.",),
        ("The time of a step is its median beside the other variants, without evaluations; other machines differ.",),
        {"evaluated at": _evaluated(found), "batch": config.batch_size},
        (
            Figure("over-steps", "lines", "Over steps", "step", label, tuple(over_steps),
                   "Median and range over seeds.", f"Lines of {label} over steps: {listed(words)}."),
            Figure("over-time", "lines", "Over time", "seconds of training", label, tuple(over_time),
                   "The same, each step taking what it takes.",
                   f"The same lines over seconds: {listed(words)}."),
        ),
        (Table("To the mark", ("Variant", "Steps", "Seconds"), tuple(rows)),),
    )  # fmt: skip


def search_section(config: CompareConfig, found: Records) -> Section | None:
    """Which rates were tried, and what came of them."""
    searched = found.where(section="search")
    if not searched.lines:
        return None
    series, rows, edges = [], [], []
    rungs = searched.distinct("rung")
    for name in config.variants:
        first = planning.scores(config, found, name, min(rungs))
        drawn = {lr: item for lr, item in sorted(first.items()) if item is not None}
        series.append(Series(name, tuple(drawn), tuple(rounded(item) for item in drawn.values()), role=role(name)))
        lines = found.where(section="measure", variant=name).lines
        if lines:
            lr = lines[0]["lr"]
            edges += [f"{name} ({lr:g})"] if lr in (config.lrs[0], config.lrs[-1]) else []
        tried = [planning.scores(config, found, name, rung) for rung in rungs]
        rows += [(name, lr, *(_cell(scored, lr) for scored in tried)) for lr in sorted(tried[0])]
    chosen = {
        name: lines[0]["lr"]
        for name in config.variants
        if (lines := found.where(section="measure", variant=name).lines)
    }
    told = [f"{name} {lr:g}" for name, lr in chosen.items()]
    return Section(
        "search",
        "Learning rates",
        "Which learning rate is best for each variant?",
        f"Found on validation data: {listed(told)}." if told else "The search is not finished.",
        (
            "Successive halving: every rate for a quarter of a run, the better half to the half, the best two to the "
            "end; the mean of the last three validations decides. Every variant has the same rates and steps.",
        ),
        (
            *_at_the_edge(config, edges),
            "A rate that is best early need not be best at the end: what halving dropped was not seen further. One "
            "seed searched.",
        ),
        {"rates": listed(f"{lr:g}" for lr in config.lrs), "optimizer": config.optimizer, "seed": config.search_seed},
        (
            Figure("rates", "lines", "After the first rung", "learning rate", f"validation {config.metric}",
                   tuple(series), "Where a line ends, larger rates diverged.",
                   f"Validation {config.metric} after a quarter of a run by learning rate; chosen: {listed(told)}.",
                   log_x=True),
        ),
        (Table("All that was tried", ("Variant", "Rate", *(f"Rung {rung + 1}" for rung in rungs)), tuple(rows),
               f"Validation {config.metric}, the mean of the rung's last three; empty where it was not tried."),),
    )  # fmt: skip


def cost_section(config: CompareConfig, found: Records) -> Section | None:
    """Time and memory of a step."""
    timed = {name: step_seconds(found, name) for name in config.variants}
    if not any(timed.values()):
        return None
    kept = {name: memory(found, name) for name in config.variants}
    kind = found.where(section="calibrate", metric="memory").lines[0]["what"]
    rows: list[tuple[Cell, ...]] = []
    for name in config.variants:
        seconds, other = timed[name], timed[config.reference]
        size, its = kept[name], kept[config.reference]
        first = found.where(section="calibrate", variant=name, what="first step").value("seconds")
        rows.append(
            (
                name,
                None if seconds is None else rounded(1000 * seconds),
                None if not seconds or not other else rounded(seconds / other),
                None if size is None else rounded(size / 1e6),
                None if not size or not its else rounded(size / its),
                None if first is None else rounded(1000 * first),
            )
        )
    threads = found.where(section="calibrate").value("threads")
    ratios = [f"{row[0]} {short(float(row[2]))} times" for row in rows[1:] if isinstance(row[2], float)]
    where = (
        "the allocator's peak during a step, with this model and its optimizer alone"
        if "device" in kind
        else "what autograd keeps for the backward pass (hooks on saved tensors), parameters and inputs not counted"
    )
    return Section(
        "cost",
        "Cost",
        "What does it cost?",
        f"A step takes, against {config.reference}: {listed(ratios)}.",
        (
            "Rounds of one step of each variant in turn, in one process; the median. So what disturbs the machine "
            "disturbs all alike: trust the ratios more than the milliseconds.",
            f"Memory: {where}.",
        ),
        ("In use (eval), a batch norm can be folded into the layer before it and then costs nothing: bn.fold.",),
        {"device": config.device, "threads": threads, "amp": config.amp or "off", "compile": config.compile},
        tuple(
            Figure(name, "bars", title, "", unit,
                   tuple(Series(row[0], (row[0],), (row[place],), role=role(str(row[0]))) for row in rows),  # type: ignore[arg-type]
                   caption, f"{title}: {listed(f'{row[0]} {row[place]}' for row in rows)}.")
            for name, title, unit, place, caption in (
                ("step-time", "Time of a step", "milliseconds", 1, "Median of interleaved rounds."),
                ("memory", "Memory of a step", "MB", 3, "Megabytes of 10^6 bytes."),
            )
        ),
        (
            Table("By variant", ("Variant", "Step, ms", "Time ratio", "Memory, MB", "Memory ratio", "First step, ms"),
                  tuple(rows)),
        ),
    )  # fmt: skip


def _number(item: float | None) -> str:
    return "none" if item is None else short(item)


def _evaluated(found: Records) -> str:
    lines = found.where(section="measure", metric="validation").lines
    if not lines:
        return "nothing yet"
    first = [line["step"] for line in lines if line["run"] == lines[0]["run"]]
    return f"{len(first)} steps from {first[0]} to {first[-1]}, denser at the beginning"


def _at_the_edge(config: CompareConfig, edges: list[str]) -> list[str]:
    if not edges or len(config.lrs) < 2:
        return []
    told = f"At the edge of the rates that were tried: {listed(edges)}. A better one may lie outside"
    return [f"{told}: give lrs= with more of them."]


def _cell(scored: dict[float, float | None], lr: float) -> Cell:
    if lr in scored and scored[lr] is None:
        return "diverged"
    return rounded(scored.get(lr))
