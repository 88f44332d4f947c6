"""BN302: train mode and eval mode give different outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchnorm.probes.health.batches import unlike
from batchnorm.probes.health.measured import Parting
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.stale import stale_layers

if TYPE_CHECKING:
    from batchnorm.probes.health.subject import Subject

APART = 0.3
"""Outputs disagree from this distance on, in units of the deviation between samples."""
BEYOND_NOISE = 1.75
"""And from this multiple of what halving the batch does."""


def parts(parting: Parting) -> bool:
    """Whether two modes disagree by more than the noise of a batch; where that was not measured, they do not."""
    return parting.distance > APART and parting.distance > BEYOND_NOISE * parting.noise


@rule("BN302", "train-eval-disagree", "warning", needs="batches")
def train_eval_disagree(subject: Subject) -> Iterator[Sign]:
    """Outputs in train and eval mode differ by more than the noise of a batch.

    Runs each batch in eval mode and with only the batch norms in train mode (dropout and the like off, random numbers
    the same, nothing is updated). The distance is the root of the mean squared difference over the outputs, in units
    of their standard deviation between samples. Some is normal, because a batch's statistics are noisy. How much, the
    batch itself tells: its even and odd samples are run in train mode by themselves, and the statistics of a half
    differ from those of the whole by the same variance, sigma^2 / n, as those of the whole from the population's. A
    finding is a distance above .3 and above 1.75 times that of the halves, of the outputs and of the output of at least
    one batch norm, the first of which is named.

    A model that is scored in eval mode is then not the one that was trained. Stale running statistics are one cause
    (BN301), also where the gap of each layer is too small to be found and adds up through the layers; batches that are
    unlike one another are the other (BN304).

    Remedy: ``bn.recalibrate(model, batches)``; where batches are unlike one another, shuffle them.

    False alarms: batches whose samples are not drawn as in training (sorted, or all alike) disagree though the model is
    well. Not judged: batches of less than 4 samples or that cannot be cut, models without outputs (N, ...), and layers
    that still have the statistics that they were made with, which BN301 says for all at once.
    """
    survey = subject.survey
    if any(seen.fresh and seen.learns for seen in survey.layers) or not parts(survey.outputs):
        return
    layers = [seen for seen in survey.layers if seen.learns and seen.parting.spread]
    first = next((seen for seen in layers if parts(seen.parting)), None)
    if layers and first is None:
        return  # each layer within its noise: an unlucky batch, not a difference of modes
    outputs = survey.outputs
    numbers: dict[str, float | int | str] = {"distance": outputs.distance, "noise": outputs.noise}
    message = (
        f"outputs in train and eval mode are {outputs.distance:.2g} standard deviations apart, where the noise of a "
        f"batch explains {outputs.noise:.2g}"
    )
    if survey.decisions and survey.flips > survey.flips_of_halves:
        numbers |= {"flips": survey.flips, "flips_of_halves": survey.flips_of_halves, "samples": survey.decisions}
        message += f"; the largest output is another in {survey.flips} of {survey.decisions} samples"
    if first is not None:
        parting = first.parting
        numbers |= {"layer_distance": parting.distance, "layer_noise": parting.noise}
        message += (
            f"; {first.name} is the first layer where they part ({parting.distance:.2g}, noise {parting.noise:.2g})"
        )
    if stale_layers(survey):
        remedy = "its running statistics are not the data's (BN301): bn.recalibrate(model, batches)"
    elif unlike(survey):
        remedy = "the batches are unlike one another (BN304): shuffle them"
    else:
        remedy = "gaps that are small in each layer add up: bn.recalibrate(model, batches)"
    yield Sign(first.name if first is not None else "", message, remedy, numbers)
