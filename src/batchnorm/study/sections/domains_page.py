"""Section ``domains`` in words, tables and figures. Every claim is decided by the records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from batchnorm.study import sections
from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Figure, Section, Spread, Table
from batchnorm.study.records import Records
from batchnorm.study.sections.domains import EXACT, SHIFTS, accuracy, accuracy_by_seed
from batchnorm.study.sections.headline_page import NOISE
from batchnorm.study.settings.domains import TARGET
from batchnorm.study.wording import Role, bars, listed, ranged_share, rounded, share, short

# The columns of the table: net, way, title.
WAYS: dict[str, tuple[str, str, str]] = {
    "none": ("none", "frozen", "Without BN"),
    "frozen": ("batch", "frozen", "BN, frozen"),
    "adabn": ("batch", "adabn", "AdaBN"),
    "few": ("batch", "few", "AdaBN, few"),
    "tent": ("batch", "tent", "TENT"),
    "coral": ("batch", "coral", "CORAL, BN"),
    "coral-none": ("none", "coral", "CORAL, without BN"),
    "each": ("batch", "each-shuffled", "Each batch"),
    "one-class": ("batch", "each-one-class", "Each batch, one class"),
}
DRAWN: tuple[tuple[str, Role], ...] = (("none", "none"), ("frozen", "batch"), ("adabn", "control"), ("coral", "other"))


@dataclass(frozen=True)
class Found:
    """The records of the section, asked by way and change."""

    records: Records

    def of(self, way: str, shift: str) -> float:
        """The median accuracy over seeds."""
        net, how, _ = WAYS[way]
        return accuracy(self.records, net, shift, how).median or 0.0

    def told(self, way: str, shift: str) -> str:
        """Median and range in words."""
        net, how, _ = WAYS[way]
        return ranged_share(accuracy(self.records, net, shift, how))

    def differences(self, way: str, shift: str, over: str = "frozen") -> list[float]:
        """By how much one way is better than another, seed by seed."""
        here, there = (accuracy_by_seed(self.records, WAYS[each][0], shift, WAYS[each][1]) for each in (way, over))
        return [here[seed] - there[seed] for seed in sorted(here.keys() & there.keys())]

    def gain(self, way: str, shift: str, over: str = "frozen") -> float:
        """The median of the differences."""
        return median(self.differences(way, shift, over))

    def noticed(self, way: str) -> tuple[int, int]:
        """How often batches were said to be sorted, and in how many cases."""
        values = [line["value"] for line in self.records.where(metric="noticed", way=WAYS[way][1])]
        return sum(values), len(values)

    def agreement(self) -> float:
        """The least share of images that get the answer of the clean ones, of the changes that algebra undoes."""
        return min(line["value"] for line in self.records.where(metric="agreement") if line["shift"] in EXACT)


CHANGED = tuple(shift for shift in SHIFTS if shift != "clean")
OTHER = tuple(shift for shift in CHANGED if shift not in EXACT)


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while one of the two nets is missing."""
    if any(not accuracy(records, net, "clean").values for net in ("none", "batch")):
        return None
    found = Found(records)
    return Section(
        name="domains",
        title=sections.SECTIONS["domains"],
        question="What becomes of batch normalization when the images of the test are not like those of the training?",
        headline=_headline(found),
        shows=tuple(_shows(config, found)),
        does_not_show=tuple(_does_not_show(config, found)),
        setup=_setup(config),
        figures=(_figure(found), _sorted_figure(found)),
        tables=(_table(config, found),),
    )


def _headline(found: Found) -> str:
    worst = min(CHANGED, key=lambda shift: found.of("frozen", shift))
    best = max(OTHER, key=lambda shift: found.gain("adabn", shift))
    ahead = max(CHANGED, key=lambda shift: found.gain("none", shift, "adabn"))
    behind = found.gain("frozen", worst, "none") < -NOISE
    undo = "undo" if found.agreement() >= 1 - NOISE else "do NOT wholly undo"
    brings = "bring" if found.gain("adabn", best) > NOISE else "do NOT bring"
    end = (
        f"with {SHIFTS[ahead]} the net without BN stays ahead ({share(found.of('none', ahead))} against "
        f"{share(found.of('adabn', ahead))})"
        if found.gain("none", ahead, "adabn") > NOISE
        else "the net without BN is ahead of that under no change"
    )
    return (
        f"With frozen statistics BN {'falls' if behind else 'holds as the net without does'}, from "
        f"{share(found.of('frozen', 'clean'))} to {share(found.of('frozen', worst))} ({SHIFTS[worst]}; without BN "
        f"{share(found.of('none', worst))}); statistics of new images (AdaBN) {undo} brightness and contrast, which is "
        f"algebra, and {brings} {_arrow(found, best)}; {end}."
    )


def _arrow(found: Found, shift: str) -> str:
    return f"{SHIFTS[shift]} from {share(found.of('frozen', shift))} to {share(found.of('adabn', shift))}"


def _shows(config: StudyConfig, found: Found) -> Iterator[str]:
    below = [shift for shift in CHANGED if found.gain("frozen", shift, "none") < -NOISE]
    if below:
        pairs = (
            f"{SHIFTS[shift]} {share(found.of('frozen', shift))} and {share(found.of('none', shift))}"
            for shift in below
        )
        yield (
            f"Frozen BN is worse off than the net without it under {len(below)} of {len(CHANGED)} changes: "
            f"{listed(pairs)} (as trained {share(found.of('frozen', 'clean'))} and {share(found.of('none', 'clean'))})."
        )
    else:
        yield "Frozen BN is no worse off than the net without it under any of the changes."
    agreement = found.agreement()
    whose = "every image gets" if agreement == 1.0 else f"at least {share(agreement)} of the images get"
    yield (
        "Brightness and contrast are undone by algebra, not by learning: over images, w (a x + c) + b has the same "
        f"standardized values as w x + b. Measured: with AdaBN, {whose} the answer of the unchanged one. CORAL's map "
        "moves along in the same way."
    )
    told = (f"{SHIFTS[shift]} {found.told('frozen', shift)} -> {found.told('adabn', shift)}" for shift in OTHER)
    yield f"What algebra does not undo, BN frozen -> AdaBN: {listed(told)}."
    few = listed(
        f"{SHIFTS[shift]} {share(found.of('few', shift))} ({share(found.of('adabn', shift))})" for shift in SHIFTS
    )
    yield f"With only {config.domains.few} images of the new kind (with {TARGET}), AdaBN comes to: {few}."
    yield from _each_batch(config, found)
    most = max(SHIFTS, key=lambda shift: found.gain("tent", shift, "adabn"))
    gain = found.gain("tent", most, "adabn")
    if gain <= NOISE:
        yield "TENT adds nothing measurable to the statistics that it stands on, under no change."
    else:
        yield f"TENT adds at most {short(100 * gain)} points to the statistics that it stands on ({SHIFTS[most]})."


def _each_batch(config: StudyConfig, found: Found) -> Iterator[str]:
    """What batches of one class do, told of the brighter images, where shuffled ones are as good as can be."""
    shift = "brightness"
    sorted_, shuffled = found.told("one-class", shift), found.told("each", shift)
    breaks = found.gain("one-class", shift, "each") < -NOISE
    worse = found.gain("one-class", shift) < -NOISE
    end = ", worse than not adapting" if breaks and worse else ""
    seen, cases = found.noticed("one-class")
    false, others = found.noticed("each")
    yield (
        f"Normalized with each batch of about {config.batch} by itself, brighter images come to {shuffled}; in batches "
        f"of one class {'that breaks' if breaks else 'it holds'}: {sorted_}{end}. bn.adapt warned of sorted batches in "
        f"{seen} of {cases} such cases, and in {false} of {others} where they were shuffled."
    )


def _does_not_show(config: StudyConfig, found: Found) -> Iterator[str]:
    ahead = [shift for shift in CHANGED if found.gain("none", shift, "adabn") > NOISE]
    if ahead:
        pairs = (
            f"{SHIFTS[shift]} {share(found.of('none', shift))} and {share(found.of('adabn', shift))}" for shift in ahead
        )
        yield (
            "That BN with new statistics is best: the net without BN, not adapted at all, is ahead of AdaBN with "
            f"{listed(pairs)}."
        )
    harmed = [shift for shift in SHIFTS if found.gain("adabn", shift) < -NOISE]
    if harmed:
        told = listed(_arrow(found, shift) for shift in harmed)
        yield f"That new statistics can do no harm: AdaBN took {told}."
    for shift in OTHER:
        differences = found.differences("adabn", shift)
        if min(differences) < 0 < max(differences):
            yield (
                f"That every change is one of statistics: whether AdaBN helps with {SHIFTS[shift]}, the seeds do not "
                f"agree ({100 * min(differences):.1f} to +{100 * max(differences):.1f} points)."
            )
    if found.gain("few", "clean") < -NOISE:
        yield (
            f"That a few images do: where nothing had changed, the statistics of {config.domains.few} took accuracy "
            f"from {share(found.of('frozen', 'clean'))} to {share(found.of('few', 'clean'))}."
        )
    yield _coral(found)
    yield f"TENT at its best: it had one pass over {TARGET} images, with Adam at {short(config.domains.tent_lr)}."
    yield "Shifts of the real world: these are made, one at a time, and all classes are as frequent as in training."


def _coral(found: Found) -> str:
    verdicts = []
    for word, sign in (("ahead of", 1), ("behind", -1)):
        shifts = [shift for shift in OTHER if sign * found.gain("coral", shift, "adabn") > NOISE]
        if shifts:
            told = listed(f"{SHIFTS[shift]} {share(found.of('coral', shift))}" for shift in shifts)
            verdicts.append(f"{word} AdaBN ({told})")
    verdict = " and ".join(verdicts) or "as good as AdaBN, to what these tests resolve"
    return (
        f"That BN's layers are the place to adapt: CORAL on the input, in front of the same frozen net, is {verdict}."
    )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.domains
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": "64 - 3 x 100 ReLU - 10, He normal weights, biases 0, BN before the ReLU, momentum .1",
        "training": f"plain SGD, rate {short(wanted.lr)}, batch {config.batch}, {wanted.steps} steps, images unchanged",
        "brightness": f"every pixel + {short(wanted.brightness)}",
        "low contrast": f"every pixel x {short(wanted.contrast)}",
        "noise": f"Gaussian, deviation {short(wanted.noise)}, independent for each pixel",
        "blur": "the mean of the 3 x 3 pixels around each",
        "one-pixel displacement": "to the right",
        "AdaBN": (
            f"bn.adapt(model, batches) with the {TARGET} validation images, changed likewise, without labels; "
            f"few: {wanted.few} of them, the mean of {wanted.draws} draws"
        ),
        "each batch": f"bn.adapt(model, episodic=True): the tested images, about {config.batch} at a time",
        "TENT": f"bn.adapt(model, batches, method='tent') on the same {TARGET} images",
        "CORAL": f"preprocessing.CORAL(shrinkage='ledoit-wolf'), fitted from the {TARGET} to the training images",
        "accuracy": "on the changed test part, which nothing but 'each batch' is adapted to",
        "seeds": listed(config.seed_list()),
    }


def _figure(found: Found) -> Figure:
    series = [bars(WAYS[way][2], tuple(SHIFTS.values()), _spreads(found, way), role) for way, role in DRAWN]
    told = listed(
        f"{SHIFTS[shift]}: " + ", ".join(f"{WAYS[way][2]} {share(found.of(way, shift))}" for way, _ in DRAWN)
        for shift in SHIFTS
    )
    return Figure(
        "domains-accuracy",
        "bars",
        "Changed images: frozen, and adapted",
        "the test images",
        "test accuracy",
        tuple(series),
        "Median and range over seeds. AdaBN and CORAL have seen other images of the same kind, without labels.",
        f"Bars for each change. {told}.",
        y_range=(0.0, 1.0),
    )


def _sorted_figure(found: Found) -> Figure:
    ways: tuple[tuple[str, str, Role], ...] = (
        ("frozen", "BN, frozen", "batch"),
        ("each", "statistics of each shuffled batch", "control"),
        ("one-class", "statistics of each batch of one class", "other"),
    )
    series = [bars(title, tuple(SHIFTS.values()), _spreads(found, way), role) for way, title, role in ways]
    told = listed(
        f"{SHIFTS[shift]} {share(found.of('each', shift))} and {share(found.of('one-class', shift))}"
        for shift in SHIFTS
    )
    return Figure(
        "domains-sorted",
        "bars",
        "Adapted to each batch: shuffled, and sorted by class",
        "the test images",
        "test accuracy",
        tuple(series),
        "Median and range over seeds.",
        f"Bars for each change, shuffled and sorted batches: {told}.",
        y_range=(0.0, 1.0),
    )


def _table(config: StudyConfig, found: Found) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (title, *(rounded(found.of(way, shift)) for way in WAYS)) for shift, title in SHIFTS.items()
    ]
    columns = ("Test images", *(title for _, _, title in WAYS.values()))
    note = f"Test accuracy, median over seeds. Few: {config.domains.few} images; otherwise {TARGET}."
    return Table("Which way of adapting helps?", columns, tuple(rows), note)


def _spreads(found: Found, way: str) -> list[Spread]:
    net, how, _ = WAYS[way]
    return [accuracy(found.records, net, shift, how) for shift in SHIFTS]
