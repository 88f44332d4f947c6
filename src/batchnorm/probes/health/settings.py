"""Rules about the numbers that a layer is made with: momentum, eps and dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.nn.recognition import is_frozen
from batchnorm.probes.health.layer_state import has_statistics, held, initial, moves, of_channels, statistics
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Subject

KERAS_MOMENTUM = 0.9
LEAST_EPS = {torch.float16: 2.0**-24, torch.bfloat16: 1e-10, torch.float32: 1e-10, torch.float64: 1e-26}
LARGE_EPS = 0.01
MOST_SHIFT = 0.05


@rule("BN104", "momentum-out-of-range", "warning")
def momentum_out_of_range(subject: Subject) -> Iterator[Sign]:
    """A momentum outside of 0 to 1, or one that looks like Keras's.

    Outside [0, 1], or NaN (error): the running statistics are no average, and diverge below 0 and above 2. From 0.9 to
    1 (warning): torch's momentum is the weight of the *new* value, Keras's, Flax's and ONNX's that of the old one, and
    their defaults are 0.99 and 0.9. With 0.99 here, eval uses what is nearly the statistics of the last batch alone.

    None (the cumulative average) is fine, and so are small values: TensorFlow's 0.99 is 0.01 here.

    Remedy: ``momentum = 1 - momentum`` and ``bn.recalibrate(model, batches)``.

    False alarms: statistics that are to follow the last batch, for an estimate over a single large one.
    """
    for layer in subject.trained:
        momentum = getattr(layer.module, "momentum", None)
        if momentum is None or not isinstance(momentum, int | float) or not has_statistics(layer.module):
            continue
        numbers = {"momentum": float(momentum)}
        if not 0 <= momentum <= 1:
            yield Sign(
                layer.name,
                f"momentum is {momentum}, outside [0, 1]: the running statistics are no average",
                "set momentum to 0.1 and bn.recalibrate(model, batches)",
                numbers,
                severity="error",
            )
        elif momentum >= KERAS_MOMENTUM:
            yield Sign(
                layer.name,
                f"momentum is {momentum}, here the weight of the new value: the running statistics are those of the "
                + ("last batch" if momentum == 1 else "last batch or two; Keras's momentum is the weight of the old"),
                f"set momentum to {1 - momentum:.4g} (None for a cumulative average) and bn.recalibrate(model, batches)"
                if momentum < 1
                else "set momentum to 0.1 and bn.recalibrate(model, batches)",
                numbers,
            )


@rule("BN105", "eps-too-small", "warning")
def eps_too_small(subject: Subject) -> Iterator[Sign]:
    """An eps that no longer protects a channel without variance.

    0 or less (error): torch refuses to train with it, and in eval a running variance of 0 gives NaN or infinity. Below
    2^-24 (6e-8) in a layer whose gamma or statistics are float16 (warning): torch itself adds eps in float32, but every
    runtime that takes the layer as float16 rounds it to 0, 2^-24 being the least number that float16 has. Below 1e-10
    otherwise (warning; 1e-26 for float64): neighbouring float32 numbers near 100 are 7.6e-6 apart, so that the rounding
    of a constant input comes near sqrt(eps) = 1e-5, and the layer makes of it output of order 1.

    torch's 1e-5 and the 1e-3 of Keras are fine in every dtype.

    Remedy: ``eps = 1e-5``; outputs change only where the variance is as small as that.

    False alarms: layers whose inputs never are constant, and are nowhere near it.
    """
    for layer in subject.layers:
        eps = getattr(layer.module, "eps", None)
        if not isinstance(eps, int | float):
            continue
        dtypes = [t.dtype for key in ("weight", "running_var") if (t := held(layer.module, key)) is not None]
        dtype = torch.float16 if torch.float16 in dtypes else dtypes[0] if dtypes else torch.float32
        least = LEAST_EPS.get(dtype, LEAST_EPS[torch.float32])
        numbers = {"eps": float(eps), "least": least}
        constant = is_frozen(layer.module)
        if (eps < 0 if constant else eps <= 0) or eps != eps:
            yield Sign(
                layer.name,
                f"eps is {eps}: torch cannot train with it, and a channel without variance is divided by 0",
                "set eps to 1e-5",
                numbers,
                severity="error",
            )
        elif eps < least and not constant:
            yield Sign(
                layer.name,
                f"eps is {eps}, below {least:.2g} for {str(dtype).removeprefix('torch.')}: "
                + ("it is 0 where it is stored so" if dtype == torch.float16 else "rounding errors become outputs"),
                "set eps to 1e-5",
                numbers,
            )


@rule("BN106", "half-precision-statistics", "warning")
def half_precision_statistics(subject: Subject) -> Iterator[Sign]:
    """Running statistics in float16 or bfloat16 that lose what matters.

    In train mode, always: a momentum step that is smaller than half the distance to the next number is lost, so that
    the averages stop short of the truth (a bfloat16 mean near 1 moves in steps of .008, and with momentum 0.1 stops up
    to .04 away). In eval, where the rounding of running_mean alone may shift a channel by .05 deviations or more:
    half the distance to the next number, over sqrt(running_var + eps).

    Remedy: keep the layer in float32; torch's and our layers take half precision input all the same. The statistics
    that are lost come back with ``bn.recalibrate(model, batches)``.

    False alarms: training in half precision with statistics that are recalibrated afterwards.
    """
    for layer in subject.layers:
        mean = held(layer.module, "running_mean")
        if mean is None or mean.dtype not in (torch.float16, torch.bfloat16):
            continue
        name = str(mean.dtype).removeprefix("torch.")
        remedy = f"keep it in float32, which takes {name} input too: layer.float(), then bn.recalibrate(model, batches)"
        relative = torch.finfo(mean.dtype).eps
        if moves(layer.module):
            yield Sign(
                layer.name,
                f"running statistics in {name} and in train mode: steps below {relative / 2:.2g} of a value are lost",
                remedy,
                {"dtype": name, "relative_step": relative},
            )
            continue
        known = statistics(layer.module)
        if known is None or initial(layer.module):
            continue
        # The distance to the next number is eps times the power of two below.
        apart = torch.exp2(torch.floor(torch.log2(known[0].abs()))) * relative
        shift = apart / 2 / torch.sqrt(known[1].clamp(min=0) + float(getattr(layer.module, "eps", 0.0)))
        found = shift.nan_to_num(0.0) >= MOST_SHIFT
        if found.any():
            yield Sign(
                layer.name,
                f"rounding of running_mean in {name} shifts {of_channels(found)} by up to "
                f"{float(shift.nan_to_num(0.0).max()):.2g} deviations",
                remedy,
                {"dtype": name, "channels": int(found.sum()), "largest_shift": float(shift.nan_to_num(0.0).max())},
            )


@rule("BN109", "eps-too-large", "warning")
def eps_too_large(subject: Subject) -> Iterator[Sign]:
    """An eps of 0.01 or more, often a momentum in the wrong place.

    torch's second argument is eps: ``nn.BatchNorm2d(64, 0.8)`` has eps 0.8, where Keras's first is the momentum. A
    channel then comes out with variance var / (var + eps) instead of 1, which differs from channel to channel. Ten
    times the 1e-3 of Keras is where this begins; no common architecture has more than that.

    Remedy: ``eps = 1e-5`` and train; in a trained model it belongs to the function: keep it.

    False alarms: an eps that was chosen to damp channels of little variance.
    """
    for layer in subject.layers:
        eps = getattr(layer.module, "eps", None)
        if isinstance(eps, int | float) and eps >= LARGE_EPS:
            yield Sign(
                layer.name,
                f"eps is {eps}: a channel of variance 1 comes out with {1 / (1 + eps):.2g}"
                + (f"; was momentum={eps} meant?" if eps < 1 else ""),
                "name the argument (momentum=...) and leave eps at 1e-5; a model that was trained with it needs it",
                {"eps": float(eps)},
            )
