"""Section 1 in words, tables and figures. Every number is computed from the records, every claim depends on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from batchnorm.study import sections
from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Series, Spread, Table
from batchnorm.study.measures import Curve, best, ratios, spread, steps_to
from batchnorm.study.records import Records
from batchnorm.study.sections import headline
from batchnorm.study.sections.headline import FURTHER, THRESHOLD, by_seed, rates, tuned_rate
from batchnorm.study.wording import band, bars, listed, ranged, rounded, share, short, triple

# Below this share of the net's tests, a difference is noise (497 test images, one is 0.2%).
NOISE = 0.01
PAPER_RATIO = 14


@dataclass(frozen=True)
class Case:
    """Two nets side by side, seed by seed: without BN at rate ``lr``, with BN at ``batch_lr``."""

    title: str
    lr: float
    batch_lr: float
    pairs: tuple[tuple[Curve, Curve], ...]
    seeds: tuple[int, ...]

    def steps(self, threshold: float | None) -> tuple[Spread, Spread, Spread]:
        """Steps without, steps with, and their ratio; None asks for the best that the net without BN reached."""
        marks = [threshold if threshold is not None else best(plain) or 2.0 for plain, _ in self.pairs]
        plain = [steps_to(pair[0], mark) for pair, mark in zip(self.pairs, marks, strict=True)]
        batch = [steps_to(pair[1], mark) for pair, mark in zip(self.pairs, marks, strict=True)]
        return spread(plain), spread(batch), ratios(plain, batch)


def cases(config: StudyConfig, records: Records) -> dict[str, Case]:
    """The cases that the records hold, by name."""
    slow, factor = config.headline.conservative_lr, config.headline.wide_init
    found: dict[str, Case] = {}

    def add(name: str, title: str, case: str, lr: float, batch_lr: float) -> None:
        plain, batch = by_seed(records, case, "none", lr), by_seed(records, case, "batch", batch_lr)
        seeds = tuple(sorted(plain.keys() & batch.keys()))
        if seeds:
            found[name] = Case(title, lr, batch_lr, tuple((plain[seed], batch[seed]) for seed in seeds), seeds)

    for case, title in (
        ("tuned", "Tuned baseline, same rate"),
        ("wide-init", f"Weights begin {short(factor)} x as large"),
        ("relu", "ReLU and He initialisation"),
    ):
        if records.where(case=case).lines:
            lr = tuned_rate(config, records, case)
            add(case, title, case, lr, lr)
    add("conservative", f"Untuned, cautious rate {short(slow)}", "conservative", slow, slow)
    add("times-5", "The same, BN at 5 x the rate", "conservative", slow, 5 * slow)
    return found


def speedup(config: StudyConfig, records: Records) -> dict[str, Any] | None:
    """The headline ratio as data, None without both of its sides."""
    case = cases(config, records).get("tuned")
    if case is None:
        return None
    plain, batch, ratio = case.steps(THRESHOLD)
    return {
        "ratio": asdict(ratio),
        "baseline_steps": asdict(plain),
        "bn_steps": asdict(batch),
        "baseline_lr": case.lr,
        "bn_lr": case.batch_lr,
        "threshold": THRESHOLD,
        "seeds": list(case.seeds),
    }


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while the tuned pair is missing."""
    found = cases(config, records)
    if "tuned" not in found:
        return None
    plain, batch, ratio = found["tuned"].steps(THRESHOLD)
    cost = step_cost(records)
    return Section(
        name="headline",
        title=sections.SECTIONS["headline"],
        question="How many fewer steps to 90% test accuracy with batch normalization, against a tuned baseline?",
        headline=_headline(plain, batch, ratio, cost, found["tuned"]),
        shows=tuple(_shows(found, cost)),
        does_not_show=tuple(_does_not_show(config, found, records)),
        setup=_setup(config, found),
        figures=tuple(_figures(config, records, found)),
        tables=(_table(found), _marks(found["tuned"]), _tuning(config, records)),
    )


def step_cost(records: Records) -> Spread:
    """Seconds of a step with BN over seconds of one without, seed by seed, in the tuned pair."""
    timed = records.where(case="tuned", metric="seconds", what="step")
    plain = {line["seed"]: line["value"] for line in timed.where(variant="none")}
    batch = {line["seed"]: line["value"] for line in timed.where(variant="batch")}
    seeds = sorted(plain.keys() & batch.keys())
    return ratios([batch[seed] for seed in seeds], [plain[seed] for seed in seeds])


def _headline(plain: Spread, batch: Spread, ratio: Spread, cost: Spread, case: Case) -> str:
    if ratio.median is None:
        return (
            f"No ratio can be given: to 90%, the tuned baseline took {ranged(plain)} steps and the net with BN "
            f"{ranged(batch)}, over {len(case.seeds)} seeds."
        )
    if ratio.median <= 1:
        return (
            f"BN is slower here: to 90% it takes {ranged(batch)} steps, the tuned baseline {ranged(plain)} (ratio "
            f"{ranged(ratio)})."
        )
    wall = ""
    if cost.median:
        wall = f" (about {short(ratio.median / cost.median)} x in time, as a step costs {short(cost.median)} x)"
    return (
        f"BN reaches 90% in {ranged(ratio)} times fewer steps than the tuned baseline: {ranged(batch)} instead of "
        f"{ranged(plain)}{wall}."
    )


def _shows(found: dict[str, Case], cost: Spread) -> Iterator[str]:
    tuned = found["tuned"]
    ratio = tuned.steps(THRESHOLD)[2]
    if ratio.median is not None:
        against = "at least" if ratio.median >= PAPER_RATIO else "less than"
        yield (
            f"With both at the rate that is best for the net without BN, the ratio to 90% is {ranged(ratio)} over "
            f"{len(tuned.seeds)} seeds: {against} the {PAPER_RATIO} that the paper reports for ImageNet."
        )
    yield (
        f"The further mark, the smaller the gain: to 95% the ratio is {_told(tuned.steps(FURTHER)[2])}, to the best "
        f"accuracy that the baseline reaches {_told(tuned.steps(None)[2])}."
    )
    if cost.median is not None and ratio.median is not None:
        yield (
            f"A step with BN took {ranged(cost)} times as long here as one without (median processor time, one thread, "
            f"our layer): in time, the gain to 90% is about {short(ratio.median / cost.median)}."
        )
    if "conservative" in found and "times-5" in found:
        yield (
            f"Against a cautious baseline that nobody tuned, rate {short(found['conservative'].lr)}, the ratios are "
            f"{_told(found['conservative'].steps(THRESHOLD)[2])} at the same rate and "
            f"{_told(found['times-5'].steps(THRESHOLD)[2])} with BN at five times the rate. Which baseline one takes "
            "makes the headline; ours is the tuned one."
        )


def _does_not_show(config: StudyConfig, found: dict[str, Case], records: Records) -> Iterator[str]:
    tuned = found["tuned"].steps(THRESHOLD)[2].median
    for name in ("wide-init", "relu"):
        if name in found:
            ratio = found[name].steps(THRESHOLD)[2]
            smaller = tuned is not None and ratio.median is not None and ratio.median < tuned
            verdict = "Much of the gain repairs a start that is too small" if smaller else "Not so here"
            if name == "relu":
                verdict = "A net that begins well gains less" if smaller else "The gain is no smaller here"
            yield f"{found[name].title}: the ratio is {_told(ratio)}. {verdict}."
    hot = by_seed(records, "hot", "batch")
    if hot:
        tops = spread([best(curve) for curve in hot.values()])
        lost = sum(steps_to(curve, THRESHOLD) is None for curve in hot.values())
        factor = short(config.headline.hot_factor)
        fails = f"at {factor} x the tuned rate it fails in {lost} of {len(hot)} seeds (best {share(tops.median)})"
        works = f"at {factor} x the tuned rate it still got to 90% in all {len(hot)} seeds"
        yield f"BN does not make any rate safe: {fails}." if lost else f"No limit to the rate was found: {works}."
    for name in ("tuned", "wide-init"):
        if name in found:
            yield _final(found[name])
    yield "A small net on 1000 small images: the numbers are this set-up's, the direction is the paper's."


def _told(ratio: Spread) -> str:
    return "open (one of the two did not get there)" if ratio.median is None else ranged(ratio)


def _final(case: Case) -> str:
    plain, batch = case.pairs[0]
    tops = [(best(one) or 0.0, best(other) or 0.0) for one, other in case.pairs]
    gain = spread([other - one for one, other in tops])
    assert gain.median is not None
    verdict = "no gain in final accuracy beyond the noise"
    if gain.median > NOISE:
        verdict = "a gain, which may only mean that the slower net is not finished"
    if gain.median < -NOISE:
        verdict = "BN ends lower"
    ends = spread([other for _, other in tops]).median, spread([one for one, _ in tops]).median
    return (
        f"{case.title}, best test accuracy: {share(ends[0])} with BN within {batch[-1][0]} steps, {share(ends[1])} "
        f"without within {plain[-1][0]}; seed by seed {100 * gain.median:+.1f} points: {verdict} (up to "
        f"{100 * NOISE:.0f} point is noise)."
    )


def _setup(config: StudyConfig, found: dict[str, Case]) -> dict[str, Cell]:
    tuned = found["tuned"]
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": "64 - 3 x 100 sigmoid - 10, Xavier normal weights, biases 0 (paper, section 4.1)",
        "normalization": "batchnorm.nn.BatchNorm1d before the sigmoid, eps 1e-5, momentum 0.1",
        "training": f"plain SGD, batch {config.batch}, cross-entropy, {config.headline.steps} steps without BN, "
        f"{config.headline.batch_steps} with",
        "baseline's rate": f"{short(tuned.lr)}, tuned over {listed(config.headline.lrs)} by validation steps to 90%",
        "BN's rate": f"{short(tuned.batch_lr)}, the same, not tuned for BN",
        "evaluated": "test accuracy every 2 steps to step 300, then every 10; a mark counts when two in a row hold it",
        "seeds": listed(tuned.seeds),
    }


def _table(found: dict[str, Case]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for case in found.values():
        plain, batch, ratio = case.steps(THRESHOLD)
        steps = (rounded(plain.median), rounded(batch.median))
        rows.append((case.title, case.lr, case.batch_lr, *steps, *triple(ratio), len(case.seeds)))
    columns = (
        "Case",
        "Rate without",
        "Rate with BN",
        "Steps without",
        "Steps with BN",
        "Ratio",
        "Low",
        "High",
        "Seeds",
    )
    return Table(
        "Steps to 90% test accuracy, headline and counter-examples", columns, tuple(rows), "Median over seeds."
    )


def _marks(tuned: Case) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for title, mark in (("90%", THRESHOLD), ("95%", FURTHER), ("the baseline's best", None)):
        plain, batch, ratio = tuned.steps(mark)
        rows.append((title, *triple(plain), *triple(batch), *triple(ratio)))
    sides = [f"{name}{part}" for name in ("Without", "BN", "Ratio") for part in ("", " low", " high")]
    return Table("Steps to three marks, tuned baseline", ("Mark", *sides), tuple(rows), "Median and range over seeds.")


def _tuning(config: StudyConfig, records: Records) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for net, title in (("tuned", "sigmoid"), ("wide-init", "sigmoid, wide initialisation"), ("relu", "ReLU")):
        for lr in rates(config, net):
            found = by_seed(records, f"tune-{net}", "none", lr).values()
            if found:
                steps = spread([steps_to(curve, THRESHOLD) for curve in found])
                rows.append((title, lr, *triple(steps), len(found)))
    columns = ("Net without BN", "Rate", "Steps to 90%", "Low", "High", "Seeds")
    return Table("Tuning the baseline, on validation accuracy", columns, tuple(rows), "The test part is not looked at.")


def _figures(config: StudyConfig, records: Records, found: dict[str, Case]) -> Iterator[Figure]:
    pairs = found["tuned"].pairs
    plain, batch = (
        band("without", [pair[0] for pair in pairs], "none"),
        band("BN", [pair[1] for pair in pairs], "batch"),
    )
    level = Series("90%", (plain.x[0], plain.x[-1]), (THRESHOLD, THRESHOLD), role="other", dash=True)
    yield Figure(
        "headline-curves",
        "lines",
        "Test accuracy over the steps, both at the baseline's tuned rate",
        "step",
        "test accuracy",
        (_from_one(plain), _from_one(batch), _from_one(level)),
        f"Median of {len(pairs)} seeds, the band is their range. The steps are on a logarithmic scale.",
        "The net with batch normalization climbs to 90% at a small fraction of the steps of the net without; "
        "both come to rest close to each other.",
        log_x=True,
        y_range=(0.0, 1.0),
    )
    names = [case.title for case in found.values()]
    yield Figure(
        "headline-cases",
        "bars",
        "How many times fewer steps to 90%",
        "",
        "steps without / steps with BN",
        (bars("ratio", names, [case.steps(THRESHOLD)[2] for case in found.values()], "batch"),),
        "The headline is the first bar; the next two are nets that need BN less, the last baselines nobody tuned.",
        "Bars of the ratio of steps for each case, with the range over seeds as whiskers.",
    )
    lrs = [lr for lr in rates(config, "tuned") if by_seed(records, "tune-tuned", "none", lr)]
    steps = [
        spread([steps_to(curve, THRESHOLD) for curve in by_seed(records, "tune-tuned", "none", lr).values()])
        for lr in lrs
    ]
    yield Figure(
        "headline-tuning",
        "bars",
        "How the baseline's rate was chosen",
        "learning rate",
        "steps to 90% validation accuracy",
        (bars("without", [short(lr) for lr in lrs], steps, "none"),),
        f"Shortest wins: {short(headline.tuned_rate(config, records, 'tuned'))}. No bar: most seeds never got there "
        f"within {config.headline.tune_steps} steps.",
        "Bars of the steps that the net without normalization needs, for each learning rate tried.",
    )


def _from_one(series: Series) -> Series:
    """Without step 0, which a logarithmic axis has no place for."""
    keep = slice(1 if series.x and series.x[0] == 0 else 0, None)
    if series.name == "90%":
        return Series(series.name, (1, series.x[-1]), series.y, role=series.role, dash=True)
    low, high = series.low, series.high
    return Series(
        series.name,
        series.x[keep],
        series.y[keep],
        None if low is None else low[keep],
        None if high is None else high[keep],
        role=series.role,
    )
