"""A comparison as a document: the verdict, the curves, the search, the cost, how it was kept fair. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from batchnorm.study.comparison import page_measured, page_sections, planning
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.comparison.verdict import Verdict, arrivals, by_seed, judge, memory, step_seconds, tests
from batchnorm.study.comparison.words import amount, value
from batchnorm.study.document import Cell, Section, Summary, Table
from batchnorm.study.measures import spread
from batchnorm.study.records import FINISHED, Records
from batchnorm.study.wording import short

COLUMNS = ("Variant", "Rate", "Test", "Against the first", "Steps to the mark", "Time a step", "Memory")


def build(config: CompareConfig, found: Records) -> Summary:
    """The document of a configuration and its records, finished or not."""
    verdict = judge(config, found)
    parts: Iterable[Section | None] = (
        page_sections.verdict_section(config, found, verdict),
        page_measured.curves_section(config, found, verdict),
        page_measured.search_section(config, found),
        page_measured.cost_section(config, found),
        page_sections.fairness_section(config, found),
    )
    done = planning.complete(config, found)
    facts: dict[str, Cell] = {
        line["metric"]: line["value"] for line in found.where(run="environment") if line["metric"] != FINISHED
    }
    seconds = sum(line["value"] for line in found.where(section="environment", metric="seconds"))
    return Summary(
        title=f"{' and '.join(_two(config.variants))} compared: {config.model} on {config.data}",
        command=config.command,
        complete=done,
        seconds=seconds,
        environment=facts,
        config={key: item for key, item in config.to_mapping().items() if key not in ("command", "notes")},
        overview=overview(config, found, verdict, done),
        sections=tuple(part for part in parts if part is not None),
        kind="comparison",
        verdict=_plain(verdict.to_dict()),
    )


def overview(config: CompareConfig, found: Records, verdict: Verdict, done: bool) -> Table:
    """A row for each variant."""
    measured = found.where(section="measure")
    against = {item.variant: item for item in verdict.judgements}
    rows: list[tuple[Cell, ...]] = []
    for name in config.variants:
        own = by_seed(measured, name)
        known = [item for item in tests(own).values() if item is not None]
        median = spread(known).median
        difference = against[name].difference if name in against else None
        came = arrivals(config, own, verdict.mark)
        rate_found = rate(config, found, name)
        rows.append(
            (
                name,
                None if rate_found is None else f"{rate_found:g}",
                None if median is None else value(config, median),
                "the reference" if name == config.reference else None if not difference else amount(config, difference),
                None if not came else short(spread(list(came.values())).median),
                milliseconds(step_seconds(found, name)),
                megabytes(memory(found, name)),
            )
        )
    note = f"Test {config.metric} where validation is best, the median over seeds."
    if verdict.mark is not None:
        note += f" The mark is validation {config.metric} {value(config, verdict.mark)}."
    if not done:
        note += " The comparison is not finished: this is what its finished runs say."
    return Table("What was found", COLUMNS, tuple(rows), note)


def rate(config: CompareConfig, found: Records, variant: str) -> float | None:
    """The rate that a variant is measured at, None while it is searched."""
    lines = found.where(section="measure", variant=variant).lines
    if lines:
        return float(lines[0]["lr"])
    return config.lrs[0] if len(config.lrs) == 1 else None


def milliseconds(seconds: float | None) -> str | None:
    """``1.24 ms``."""
    return None if seconds is None else f"{1000 * seconds:.3g} ms"


def megabytes(count: int | None) -> str | None:
    """``12.1 MB``, of 10^6 bytes; ``54 kB`` of 10^3."""
    if count is None:
        return None
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def _two(names: tuple[str, ...]) -> tuple[str, str]:
    return (", ".join(names[:-1]), names[-1])


def _plain(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _plain(inner) for key, inner in item.items()}
    return [_plain(inner) for inner in item] if isinstance(item, list | tuple) else item
