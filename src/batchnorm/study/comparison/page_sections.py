"""The sections of a comparison's page that judge: the verdict, and how it was kept fair."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.study.comparison.intervals import LEVEL, Interval
from batchnorm.study.comparison.page_measured import role
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.comparison.verdict import Verdict, by_seed, tests
from batchnorm.study.comparison.words import amount, quality, span, value
from batchnorm.study.document import Cell, Figure, Section, Series, Table
from batchnorm.study.records import Records
from batchnorm.study.wording import listed, rounded, short

SMALL_TEST = 200


def verdict_section(config: CompareConfig, found: Records, verdict: Verdict) -> Section:
    """Each variant against the reference."""
    told = verdict.judgements
    judged = [item for item in verdict.judgements if item.difference is not None]
    factor = 100 if _points(config) else 1
    unit = "points of test " + config.metric if _points(config) else f"test {config.metric}"
    series = tuple(
        Series(
            item.variant,
            (item.variant,),
            (rounded(factor * item.difference.mean),),
            None if item.difference.low is None else (rounded(factor * item.difference.low),),
            None if item.difference.high is None else (rounded(factor * item.difference.high),),
            role=role(item.variant),
        )
        for item in judged
        if item.difference is not None
    )
    figures = (
        Figure(
            "differences",
            "bars",
            f"Difference from {verdict.reference}",
            "",
            f"difference in {unit}",
            series,
            f"Mean over seeds, with {LEVEL:.0%} intervals that hold together. One over zero shows no difference.",
            "; ".join(f"{item.variant}: {amount(config, item.difference)}" for item in judged if item.difference),
        ),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            item.variant,
            item.kind,
            None if item.difference is None else amount(config, item.difference),
            None if item.steps is None else _span(item.steps),
            None if item.time is None else _span(item.time),
            rounded(item.cost),
            rounded(item.memory),
        )
        for item in verdict.judgements
    ]
    columns = ("Variant", "Verdict", "Test difference", "Fewer steps", "Less time", "Time a step", "Memory")
    return Section(
        "verdict",
        "Verdict",
        f"Does a normalization help {config.model} on {config.data}, against {verdict.reference}?",
        " ".join(quality(config, item, len(item.difference.values) if item.difference else 0) for item in told),
        tuple(_shows(config, verdict)),
        tuple(_limits(config, found, verdict)),
        {
            "test": verdict.test,
            "seeds": listed(verdict.seeds) if verdict.seeds else "none yet",
            "metric": f"{config.metric}, {'more' if config.higher else 'less'} is better",
            "test samples": config.samples[-1],
            "mark": value(config, verdict.mark),
        },
        figures if series else (),
        (
            Table(
                f"Each variant against {verdict.reference}",
                columns,
                tuple(rows),
                "Fewer steps, less time: how many times, to the mark; above 1 is in favour of the variant.",
            ),
            _seeds_table(config, found),
        ),
    )


def fairness_section(config: CompareConfig, found: Records) -> Section:
    """What was done so that the variants differ in one thing."""
    rows: list[tuple[Cell, ...]] = []
    for name in config.variants:
        line = next(iter(found.where(section="measure", variant=name, metric="same_weights").lines), None)
        rows.append((name, None if line is None else f"{line['value']} of {line['of']}"))
    return Section(
        "fairness",
        "How it was kept fair",
        "Do the variants differ in nothing else?",
        "Same initial weights where shapes allow, same batches in the same order, same rates and steps to search, "
        "several seeds, and test data that no choice looked at.",
        (
            *config.notes,
            f"Initial weights are those of {config.reference}, copied by name and shape, seed by seed.",
            "Batches are the same, in the same order, for the same seed; dropout and the like are seeded alike.",
            "Rates are chosen on validation, with a seed of their own; the test is read where validation is best.",
        ),
        (
            "The samples are split once: the uncertainty over seeds is that of initial weights and order, not of "
            "another sample of data.",
            "One network, one optimizer, a constant rate: a schedule or weight decay may change the answer.",
        ),
        {
            "model": config.model,
            "data": config.data,
            "samples": " / ".join(str(count) for count in config.samples) + " (train / validation / test)",
            "task": config.task,
            "optimizer": config.optimizer,
            "batch": config.batch_size,
            "budget": f"{config.budget:g} s" if config.budget else f"{config.steps} steps",
        },
        (),
        (Table("Initial values shared with the first variant", ("Variant", "Values"), tuple(rows)),),
    )


def _shows(config: CompareConfig, verdict: Verdict) -> Iterator[str]:
    for item in verdict.judgements:
        yield item.text
    yield f"Method: {verdict.test}. Positive differences mean {'better' if config.higher else 'worse'}."


def _limits(config: CompareConfig, found: Records, verdict: Verdict) -> Iterator[str]:
    count, tested = len(verdict.seeds), config.samples[-1]
    if count == 1:
        yield "One seed: nothing here has an uncertainty."
    elif count:
        widths = [(i.difference.high - i.difference.low) / 2 for i in verdict.judgements
                  if i.difference and i.difference.high is not None and i.difference.low is not None]  # fmt: skip
        if widths:
            factor, unit = (100, " points") if _points(config) else (1, "")
            yield (
                f"{count} seeds: a difference smaller than about {short(factor * max(widths))}{unit} could not have "
                "been shown. More seeds make intervals narrower."
            )
        yield "Seeds differ in weights and order, not in data: on other data from the same source it may be otherwise."
    if 0 < tested < SMALL_TEST and config.task == "classification":
        yield f"{tested} test samples: one of them is {100 / tested:.1f} points."
    lines = found.where(section="measure", metric="diverged").lines
    if lines:
        names = listed(f"{line['variant']} (seed {line['seed']})" for line in lines)
        yield f"Diverged, though the search's run at that rate did not: {names}."


def _seeds_table(config: CompareConfig, found: Records) -> Table:
    measured = found.where(section="measure")
    rows: list[tuple[Cell, ...]] = []
    for name in config.variants:
        for seed, run in by_seed(measured, name).items():
            place = next((line["step"] for line in run.lines if line["metric"] == "best_validation"), None)
            rows.append((name, seed, rounded(run.value("best_validation")), place, rounded(tests({seed: run})[seed])))
    return Table("Every measured run", ("Variant", "Seed", "Best validation", "At step", "Test there"), tuple(rows))


def _points(config: CompareConfig) -> bool:
    return config.metric in ("accuracy", "balanced-accuracy")


def _span(found: Interval) -> str:
    return short(found.mean) if found.low is None else span(found)
