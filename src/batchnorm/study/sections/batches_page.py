"""Section ``batches`` in words. Every claim is decided by the records."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.study import sections
from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Section
from batchnorm.study.records import Records
from batchnorm.study.sections import batches_figures as figures
from batchnorm.study.sections.batches import APART, COMPARED, RECALIBRATION, SETTLED, TITLES
from batchnorm.study.sections.batches_found import Found, found_in, middle
from batchnorm.study.sections.deep import STUCK
from batchnorm.study.sections.headline_page import NOISE
from batchnorm.study.settings.batches import WIDTH
from batchnorm.study.wording import listed, ranged_share, share, short


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while a part of it has no records."""
    found = found_in(config, records)
    if found is None:
        return None
    helps, ghosts = _ghosts(config, found)
    return Section(
        name="batches",
        title=sections.SECTIONS["batches"],
        question="What do small batches, batches of one class and running averages that lag do to batch normalization?",
        headline=_headline(found),
        shows=(*_shows(found), *(ghosts if helps else ())),
        does_not_show=(*(() if helps else ghosts), *_does_not_show(config, found)),
        setup=_setup(config),
        figures=(figures.by_size(found), figures.by_class(config, found), figures.lagging(config, found)),
        tables=(figures.accuracies(config, found), figures.recalibrations(found)),
    )


def _headline(found: Found) -> str:
    small = min(found.sizes["batch"])
    medians = {norm: share(items[small].median) for norm, items in found.sizes.items()}
    others = listed(f"{TITLES[norm][0]} {median}" for norm, median in medians.items() if norm != "batch")
    told = f"{medians['batch']} right ({others})"
    falls = found.gap("batch", small) < -NOISE
    first = f"In batches of {small} BN falls behind: {told}" if falls else f"Batches of {small} did NOT harm BN: {told}"
    learns = middle(found.one_class["batch"]) > STUCK
    second = (
        f"from batches of one class it {'does learn' if learns else 'learns nothing'} "
        f"({share(found.one_class['batch'].median)}, without BN {share(found.one_class['none'].median)})"
    )
    momentum, step = found.greatest_gain()
    before, recalibrated = found.lag[momentum][step]
    third = (
        f"where running averages lag (momentum {short(momentum)}, step {step}), recalibration lifts "
        f"{share(before.median)} to {share(recalibrated.median)}"
        if found.gain(momentum, step) > NOISE
        else "recalibration brought nothing, at no momentum tried"
    )
    return f"{first}; {second}; {third}."


def _shows(found: Found) -> Iterator[str]:
    yield from _by_size(found)
    yield _one_class(found)
    for momentum, looks in found.lag.items():
        told = listed(
            f"{share(before.median)} -> {share(recalibrated.median)} after {step} steps"
            for step, (before, recalibrated) in looks.items()
        )
        yield f"Momentum {short(momentum)}, running averages -> recalibrated: {told}."


def _by_size(found: Found) -> Iterator[str]:
    sizes = sorted(found.sizes["batch"])
    small = sizes[0]
    behind = [size for size in sizes if found.gap("batch", size) < -NOISE]
    enough = [size for size in sizes if size > max(behind, default=0)]
    if not enough:
        yield f"BN lies behind the net without it even at {sizes[-1]} samples in a batch."
    elif behind:
        yield f"From {enough[0]} samples in a batch on, BN is level with the net without it, or ahead."
    gain, lost = found.gap("renorm", small, "batch"), -found.gap("batch", small)
    verdict = "does not help" if gain <= NOISE else "mends most of it" if gain > lost / 2 else "mends some of it"
    yield (
        f"Batch Renorm {verdict}: in batches of {small} it comes to "
        f"{ranged_share(found.sizes['renorm'][small])}, BN to {ranged_share(found.sizes['batch'][small])}. GroupNorm, "
        "whose statistics are of one sample's units and know no batch, comes to "
        f"{ranged_share(found.sizes['group'][small])}, the net without to {ranged_share(found.sizes['none'][small])}."
    )
    if small == 2:
        yield (
            "Why 2 are too few is algebra: two values less their mean, over their deviation, are +1 and -1. All that "
            "BN leaves of a unit is in which of the two samples it is larger."
        )
    again = found.recalibrated["batch"][small]
    if small in behind and again.values:
        mended = middle(again) >= middle(found.sizes["none"][small]) - NOISE
        verdict = "noisy averages were all that was wrong" if mended else "it is the training that suffers"
        yield (
            f"Recalibrated on all training data, the net of batches of {small} comes to {ranged_share(again)}: "
            f"{verdict}."
        )


def _one_class(found: Found) -> str:
    told = listed(f"{TITLES[norm][0]} {ranged_share(found.one_class[norm])}" for norm in COMPARED)
    if middle(found.one_class["batch"]) > STUCK:
        return f"Batches of one class: {told}. BN learned all the same."
    again = found.one_class_recalibrated["batch"]
    helps = middle(again) > STUCK
    return (
        f"Batches of one class: {told}. BN takes the mean of the class away from its batch, and with it what tells the "
        "class from others; at inference, what is taken away is another mean. Better averages "
        f"{'do help here' if helps else 'do not help'}: recalibrated it has {ranged_share(again)}."
    )


def _ghosts(config: StudyConfig, found: Found) -> tuple[bool, tuple[str, ...]]:
    """Whether ghost batches helped, and the sentence."""
    whole = found.sizes["batch"].get(config.batch)
    if whole is None or not found.ghost.values:
        return False, ()
    difference = middle(found.ghost) - middle(whole)
    told = f"({ranged_share(found.ghost)} against {ranged_share(whole)})"
    said = f"in batches of {config.batch} cut into ghosts of {config.batches.ghost}, BN"
    if difference > NOISE:
        return True, (f"Ghost batches help: {said} comes to more {told}.",)
    word = "gains nothing measurable" if difference >= -NOISE else "loses"
    return False, (
        f"That ghost batches help: {said} {word} {told}. What they are for, batches of thousands, is not tried here.",
    )


def _does_not_show(config: StudyConfig, found: Found) -> Iterator[str]:
    wanted, small, large = config.batches, min(found.sizes["batch"]), max(found.sizes["batch"])
    gap = found.gap("group", large, "batch")
    if gap <= NOISE:
        yield (
            f"That GroupNorm should replace BN everywhere: in batches of {large} it is "
            f"{'as good' if gap >= -NOISE else 'worse'} ({ranged_share(found.sizes['group'][large])} against "
            f"{ranged_share(found.sizes['batch'][large])})."
        )
    caught_up = [momentum for momentum, looks in found.lag.items() if abs(found.gain(momentum, max(looks))) <= NOISE]
    if caught_up:
        yield (
            f"That recalibration is always worth it: after {max(wanted.looks)} steps at the momentum "
            f"{listed(caught_up)} it changes nothing measurable."
        )
    yield (
        f"What as many samples would do: every net took {wanted.steps} steps, so that in batches of {small} it saw "
        f"{small * wanted.steps} samples, in batches of {large} {large * wanted.steps}. Compare within a size."
    )
    yield "What each could do at its own best rate: all sizes and normalizations have one."
    yield (
        "That a batch of 2 images is as bad in a convnet: a channel has a value at each position there, hundreds in a "
        "batch."
    )
    yield "What Batch Renorm can do at its best: the paper opens its bounds slowly, here they are open from the start."


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.batches
    return {
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": "64 - 3 x 100 ReLU - 10, He normal weights, biases 0, normalization before the ReLU",
        "normalizations": (
            f"none; BN, Batch Renorm (r to 3, d to 5) and ghosts of {wanted.ghost}, with momentum .1; GroupNorm with "
            f"{wanted.groups} groups of {WIDTH // wanted.groups} units"
        ),
        "sizes": f"{listed(wanted.sizes)}: plain SGD at the rate {short(wanted.lr)}, {wanted.steps} steps at each",
        "batches of one class": (
            f"{config.batch} samples, classes in random order; rate {short(wanted.class_lr)}, {wanted.class_steps} "
            "steps (faster, gradients of one class after the other undo each other)"
        ),
        "momenta": f"{listed(wanted.momenta)}: BN, batches of {config.batch}, rate {short(wanted.lr)}",
        "recalibration": f"bn.recalibrate of a copy, on the training data in batches of {RECALIBRATION}",
        "accuracy": (
            f"on the test part; the median of the last {SETTLED} evaluations, {APART} steps apart. Before and after "
            "recalibration: at exactly the step"
        ),
        "seeds": listed(config.seed_list()),
    }
