"""Section 3 in words, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Series, Spread, Table
from batchnorm.study.measures import PER, ratios, spread, steps_to
from batchnorm.study.records import Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.wording import Role, listed, ranged, rounded, short, triple

THRESHOLD = 0.9
# The first steps are left out: there, the spread of a plain net's input is next to nothing, and all is many times it.
FROM = 100
TITLES: dict[str, tuple[str, Role]] = {
    "none": ("without", "none"),
    "batch": ("BN", "batch"),
    "noisy": ("noisy BN", "control"),
}


@dataclass(frozen=True)
class Moved:
    """One variant at one rate: movement per 100 steps in units of std and absolute, and steps to 90%, over seeds."""

    relative: Spread
    absolute: Spread
    steps: Spread


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while the pair without and with BN is missing."""
    fast, slow = config.distribution.lr, config.distribution.slow_lr
    found = {variant: moved(records.where(variant=variant, lr=fast)) for variant in TITLES}
    slowly = {variant: moved(records.where(variant=variant, lr=slow)) for variant in ("none", "batch")}
    if found["none"].relative.median is None or found["batch"].relative.median is None:
        return None
    return Section(
        name="distribution",
        title=SECTIONS["distribution"],
        question="Does batch normalization keep a unit's input steady, and is that why it is fast?",
        headline=_headline(found),
        shows=tuple(_shows(config, found, slowly)),
        does_not_show=tuple(_does_not_show(config, slowly)),
        setup=_setup(config),
        figures=tuple(_figures(config, records)),
        tables=(_table(config, found, slowly),),
    )


def moved(records: Records) -> Moved:
    """Per seed the median over looks after step 100, then the spread over seeds."""
    runs = [records.where(run=run_id) for run_id in records.distinct("run")]

    def rate(metric: str) -> Spread:
        late = [[value for step, value in run.curve(metric) if step > FROM] for run in runs]
        return spread([median(values) for values in late if values])

    return Moved(rate("movement"), rate("movement_absolute"), spread([_arrival(run) for run in runs]))


def _arrival(run: Records) -> int | None:
    return steps_to(run.curve("accuracy"), THRESHOLD)


def _headline(found: dict[str, Moved]) -> str:
    plain, batch, noisy = (found[variant] for variant in TITLES)
    times = _times(plain.relative, batch.relative)
    steady = (
        f"BN makes the typical unit's input {short(times)} x steadier ({short(batch.relative.median)} instead of "
        f"{short(plain.relative.median)} std per {PER} steps)"
    )
    if times is not None and times <= 1:
        steady = (
            f"BN does not make the typical unit's input steadier here ({short(batch.relative.median)} against "
            f"{short(plain.relative.median)} std per {PER} steps)"
        )
    if noisy.relative.median is None:
        return steady + "."
    more = _times(noisy.relative, plain.relative)
    moves = f"shaken so that it moves {short(more)} x as much as without BN"
    return (
        f"{steady}; {moves}, the net still reaches 90% in {ranged(noisy.steps)} steps ({ranged(batch.steps)} unshaken)."
    )


def _shows(config: StudyConfig, found: dict[str, Moved], slowly: dict[str, Moved]) -> Iterator[str]:
    plain, batch, noisy = (found[variant] for variant in TITLES)
    yield (
        f"At rate {short(config.distribution.lr)} the percentiles travel {ranged(plain.relative)} std per {PER} steps "
        f"without BN and {ranged(batch.relative)} with it: the steadiness that the paper's Figure 1 shows."
    )
    if slowly["none"].relative.median is not None and slowly["batch"].relative.median is not None:
        times = _times(slowly["none"].relative, slowly["batch"].relative)
        yield f"At rate {short(config.distribution.slow_lr)} the two differ by a factor of {short(times)}."
    if noisy.relative.median is None or noisy.steps.median is None or batch.steps.median is None:
        return
    fast = noisy.steps.median <= 2 * batch.steps.median
    restless = plain.relative.median is not None and noisy.relative.median > plain.relative.median
    if fast and restless:
        yield (
            "With noise after BN the inputs move more than they ever did without BN, and the net learns about as fast "
            f"as with plain BN ({ranged(noisy.steps)} steps to 90%, {ranged(plain.steps)} without BN): steadiness "
            "cannot be what the speed comes from (as Santurkar et al. 2018 found)."
        )
    else:
        yield (
            f"The noisy control took {ranged(noisy.steps)} steps to 90% and moved {ranged(noisy.relative)} std per "
            f"{PER} steps: on this run it does not separate steadiness from speed."
        )


def _does_not_show(config: StudyConfig, slowly: dict[str, Moved]) -> Iterator[str]:
    yield "That steadiness causes the speed: see the noisy control."
    plain, batch = slowly["none"].absolute, slowly["batch"].absolute
    if plain.median is not None and batch.median is not None:
        verdict = "no less" if batch.median >= 0.8 * plain.median else "less"
        yield (
            f"A matter of units: in absolute numbers, at rate {short(config.distribution.slow_lr)}, the input moves "
            f"{verdict} with BN ({ranged(batch)} per {PER} steps, {ranged(plain)} without)."
        )
    yield (
        f"The first {FROM} steps are left out: a plain net's units have next to no spread there, and divided by it "
        "every movement is huge. Jitter from step to step counts as movement."
    )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.distribution
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": "64 - 3 x 100 sigmoid - 10, Xavier normal weights; looked at: the input of the third sigmoid",
        "looked at": f"percentiles 15, 50, 85 over the 300 validation images, eval mode, every {wanted.every} steps",
        "movement": f"sum of the steps between looks, per {PER} steps: mean over the percentiles, median over units, "
        f"median over looks after step {FROM}",
        "noisy BN": f"after BN, each step and unit: scale from 1 +- {short(wanted.noise_scale)}, shift from "
        f"+- {short(wanted.noise_shift)}, uniform; in force in the looks, not in the accuracy",
        "training": f"plain SGD, batch {config.batch}, {wanted.steps} steps, rates "
        + listed((wanted.lr, wanted.slow_lr) if wanted.slow else (wanted.lr,)),
        "seeds": listed(config.seed_list()),
    }


def _figures(config: StudyConfig, records: Records) -> Iterator[Figure]:
    lr = config.distribution.lr
    for variant, (title, role) in TITLES.items():
        found = records.where(variant=variant, lr=lr, metric="percentiles")
        if found.lines:
            # One seed, as in the paper: the median over seeds would be steadier than any net is.
            shown = found.where(seed=found.lines[0]["seed"])
            yield _percentiles(variant, title, role, shown)
    series = []
    for variant, (title, role) in TITLES.items():
        found = records.where(variant=variant, lr=lr, metric="movement")
        steps = sorted(step for step in found.distinct("step") if step > FROM)
        if steps:
            values = [[line["value"] for line in found.where(step=step)] for step in steps]
            low, middle, high = (tuple(rounded(of(row)) for row in values) for of in (min, median, max))
            series.append(Series(title, tuple(steps), middle, low, high, role=role))
    yield Figure(
        "distribution-movement",
        "lines",
        "How fast the typical unit's input moves",
        "step",
        f"std per {PER} steps",
        tuple(series),
        f"Median and range over seeds, at rate {short(lr)}, from step {FROM} on; logarithmic.",
        "The line of the net with BN lies lowest, that of noisy BN highest for most of the time.",
        log_y=True,
    )


def _percentiles(variant: str, title: str, role: Role, found: Records) -> Figure:
    by_step = {line["step"]: line["value"] for line in found}
    steps = tuple(sorted(by_step))
    levels = list(zip(*(by_step[step] for step in steps), strict=True))
    middle = Series(f"{title}: median, 15% to 85%", steps, levels[1], levels[0], levels[2], role=role)
    return Figure(
        f"distribution-{variant}",
        "lines",
        f"Input of a typical unit of the last hidden layer: {title}",
        "step",
        "input of the sigmoid",
        (middle,),
        f"The line is the median, the band goes from the 15th to the 85th percentile (seed {found.lines[0]['seed']}).",
        f"The 15th, 50th and 85th percentile of the typical unit's input over the steps, {title}.",
    )


def _table(config: StudyConfig, found: dict[str, Moved], slowly: dict[str, Moved]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for lr, group in ((config.distribution.lr, found), (config.distribution.slow_lr, slowly)):
        for variant, item in group.items():
            if item.relative.values:
                absolute = rounded(item.absolute.median)
                rows.append((TITLES[variant][0], lr, *triple(item.relative), absolute, *triple(item.steps)))
    columns = ("Net", "Rate", "Movement in std", "Low", "High", "Absolute", "Steps to 90%", "Low ", "High ")
    return Table(f"Movement per {PER} steps, after step {FROM}", columns, tuple(rows), "Median and range over seeds.")


def _times(above: Spread, below: Spread) -> float | None:
    return ratios([above.median], [below.median]).median
