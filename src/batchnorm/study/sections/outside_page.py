"""Normalization outside the gradient in words, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.study.config import StudyConfig
from batchnorm.study.document import Cell, Section
from batchnorm.study.records import Records
from batchnorm.study.sections import SECTIONS
from batchnorm.study.sections.outside_figures import Net, Nets, figures, nets, table, toy_table
from batchnorm.study.wording import listed, ranged, share, short

# Ten classes: 10% is chance, and what is stuck wanders a little around it.
STUCK = 0.3
TRAINS = 0.7


def section(config: StudyConfig, records: Records) -> Section | None:
    """The section, or None while BN and statistics as constants are missing at the largest rate, or the toy is."""
    found, rate = nets(records), max(config.outside.lrs)
    toy = records.where(variant="toy")
    if not toy.lines or ("constants", rate) not in found or ("batch", rate) not in found:
        return None
    return Section(
        name="outside",
        title=SECTIONS["outside"],
        question="May the gradient take the statistics of a batch for constants?",
        headline=_headline(found, rate),
        shows=tuple(_shows(config, found, rate, toy)),
        does_not_show=tuple(_does_not_show(config, found, rate)),
        setup=_setup(config),
        figures=tuple(figures(config, records, found, rate)),
        tables=(table(found), toy_table(toy)),
    )


def _fails(net: Net) -> bool:
    return net.accuracy < STUCK


def _toy(toy: Records, layer: str, metric: str) -> tuple[float, float]:
    """First and last value of a metric of the first seed's toy."""
    lines = toy.where(layer=layer, metric=metric, seed=toy.lines[0]["seed"]).curve(metric)
    return lines[0][1], lines[-1][1]


def _promise(net: Net) -> str:
    """What a step of the hidden biases keeps of the loss decrease that its gradient promises."""
    kept = net.kept.get("hidden biases")
    if kept is None or kept.median is None:
        return "its gradient moves no bias"
    if abs(kept.median) < 0.005:
        return "of the loss decrease that a step of a bias promises none comes"
    return f"of the loss decrease that a step of a bias promises {share(kept.median)} comes"


def _headline(found: Nets, rate: float) -> str:
    constants, batch = found["constants", rate], found["batch", rate]
    others = [net for (variant, lr), net in found.items() if variant == "constants" and lr != rate]
    trained = [net for net in others if net.accuracy >= TRAINS]
    against = f"BN is at {share(batch.accuracy)}"
    if _fails(constants):
        told = (
            f"Statistics taken for constants blow a net up at rate {short(rate)}: weights grow to "
            f"{constants.grew}, accuracy is {share(constants.accuracy)} where {against}; {_promise(constants)}"
        )
        if trained:
            best_of = max(trained, key=lambda net: net.accuracy)
            told += f"; but at rate {listed(net.lr for net in trained)} it did NOT fail ({share(best_of.accuracy)})"
        return told + "."
    return (
        f"Statistics taken for constants did NOT make training fail at rate {short(rate)} here: accuracy "
        f"{share(constants.accuracy)}, {against}; {_promise(constants)}."
    )


def _shows(config: StudyConfig, found: Nets, rate: float, toy: Records) -> Iterator[str]:
    yield from _toy_sentences(config, toy)
    constants = found["constants", rate]
    bias, loss = constants.last["bias_norm"], constants.last["train_loss"]
    yield (
        f"At rate {short(rate)}, statistics as constants: after {config.outside.steps} steps the hidden biases have "
        f"length {ranged(bias)}, from 0, the weights {ranged(constants.last['weight_norm'])}, from "
        f"{short(constants.first['weight_norm'].median)}; the loss is {ranged(loss)}, from "
        f"{short(constants.first['train_loss'].median)}."
    )
    yield from _kept_sentences(constants, found["batch", rate])
    reprojected = found.get(("reprojected", rate))
    plain = found.get(("none", rate))
    if reprojected is not None and plain is not None:
        better = "no better than" if reprojected.accuracy <= plain.accuracy + 0.01 else "against"
        yield (
            "Statistics may stay out of the gradient where the parameters are re-expressed so that the net computes "
            f"what it did (WhitenedLinear): {share(reprojected.accuracy)} after {config.outside.steps} steps at rate "
            f"{short(rate)}, {better} {share(plain.accuracy)} of the plain net."
        )


def _kept_sentences(constants: Net, batch: Net) -> Iterator[str]:
    weights, biases = (constants.kept.get(f"hidden {part}") for part in ("weights", "biases"))
    right, none = (batch.kept.get(f"hidden {part}") for part in ("weights", "biases"))
    if weights is None or biases is None or right is None:
        return
    promised = none is not None and none.median is not None
    mirror = share(none.median) if promised and none is not None else "nothing is promised, their gradient is 0"
    yield (
        "Of the loss decrease that its gradient promises, a short step of the hidden weights keeps "
        f"{share(weights.median)} with statistics as constants (through the statistics: {share(right.median)}), a step "
        f"of the hidden biases {share(biases.median)} (through the statistics: {mirror})."
    )


def _toy_sentences(config: StudyConfig, toy: Records) -> Iterator[str]:
    (begun, ended), (before, after) = (_toy(toy, "outside", metric) for metric in ("toy_bias", "toy_loss"))
    still = abs(after - before) <= 1e-6 * abs(before)
    yield (
        "A bias before a layer that subtracts the mean, learned alone with the mean as a constant: from "
        f"{short(begun)} to {short(ended)} in {config.outside.toy_steps} steps, and the loss "
        + (f"stays at {short(before)}." if still else f"goes from {short(before)} to {short(after)}.")
    )
    steepest = max(abs(line["value"]) for line in toy.where(layer="batch", metric="toy_gradient"))
    zero = "0 to float64's rounding" if steepest < 1e-12 else f"up to {short(steepest)}"
    yield f"The exact mirror: through the mean (BN) the gradient of that bias is {zero}, and it stays where it was."


def _does_not_show(config: StudyConfig, found: Nets, rate: float) -> Iterator[str]:
    for (variant, lr), net in found.items():
        if variant == "constants" and lr != rate:
            outcome = "fails too" if _fails(net) else "trains all the same"
            yield (
                f"That constants fail at every rate: at {short(lr)} the net {outcome} ({share(net.accuracy)}; its "
                f"weights grow to {net.grew})."
                if not _fails(net)
                else f"A rate that saves it in {short(lr)}: there the net {outcome} ({share(net.accuracy)})."
            )
    every, interval = found.get(("whitening", rate)), found.get(("whitening-interval", rate))
    if every is not None:
        told = "fails" if _fails(every) else "does not fail"
        yield (
            f"That whitening does what mean and variance do: in groups of {config.outside.group_size}, with constant "
            f"statistics of every batch, it {told} at rate {short(rate)} ({share(every.accuracy)}), though its weights "
            f"grow to {every.grew}; with running averages, which lag behind, it is at "
            f"{share(every.running.median)}."
        )
    if interval is not None:
        told = "fails" if _fails(interval) else "does not fail"
        yield (
            f"Taking statistics only every {config.outside.interval} batches and holding them between, the same "
            f"whitening {told} ({share(interval.accuracy)}, loss {ranged(interval.last['train_loss'])})."
        )
    damped, bare = found.get(("reprojected", rate)), found.get(("reprojected-bare", rate))
    if damped is not None and bare is not None:
        worse = bare.accuracy < damped.accuracy - 0.05
        yield (
            f"That re-expressing is safe by itself: with {short(config.outside.small_damping)} instead of "
            f"{short(config.outside.damping)} added to each variance it comes to {share(bare.accuracy)}, "
            + ("since steps along directions without variance become enormous." if worse else "which is no worse.")
        )


def _setup(config: StudyConfig) -> dict[str, Cell]:
    wanted = config.outside
    return {
        "toy": f"u ~ N(0, 1), target ~ N(2, 1), 100 each; b learned alone, squared error, rate {short(wanted.toy_lr)}",
        "data": "scikit-learn digits, pixels / 16; 1000 train, 300 validation, 497 test, stratified, drawn per seed",
        "network": "64 - 3 x 100 sigmoid - 10, Xavier normal weights, biases 0",
        "constants": "mean and variance of each batch, no gradient through them (NormOutsideGradient)",
        "whitening": f"the same, (S + eps I)^(-1/2) in groups of {wanted.group_size} units; also from every "
        f"{wanted.interval} batches",
        "re-expressed": f"WhitenedLinear, whitened anew every {wanted.interval} steps, {short(wanted.damping)} added "
        f"to each variance, which makes no step more than {short(1 / wanted.damping)} x as long",
        "training": f"plain SGD, batch {config.batch}, {wanted.steps} steps, rates {listed(wanted.lrs)}; whitening, "
        f"re-expressed and plain nets at {short(max(wanted.lrs))}",
        "accuracy": "on the test part; with the statistics of all training images under the weights of now, since "
        "running averages lag behind weights that run away",
        "kept": "(loss before - loss after) / promised, on a batch, for a step so short that the loss is straight; "
        f"median over looks every {wanted.every} steps, in float64",
        "seeds": listed(config.seed_list()),
    }
