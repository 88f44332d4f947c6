"""Rules about what stands before and after a batch norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from batchnorm.nn.outside import NormOutsideGradient
from batchnorm.nn.recognition import Layer, frozen_parts, is_batch_norm, is_frozen
from batchnorm.probes.health.layer_state import has_statistics, listed
from batchnorm.probes.health.passing import (
    ADDITIONS,
    CONVOLUTIONS,
    DROPOUT_FUNCTIONS,
    DROPOUTS,
    MIXING,
    PASSED_FUNCTIONS,
    PASSED_MODULES,
)
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Subject
from batchnorm.probes.wiring import OUTSIDE, Step, Wiring, function_name


@rule("BN001", "bias-before-batch-norm", "info", needs="wiring")
def bias_before(subject: Subject) -> Iterator[Sign]:
    """A linear layer or convolution whose bias the batch norm behind it subtracts again.

    Found where torch's own Linear, convolution or transposed convolution has a bias and nothing reads its output but a
    batch norm, directly. The mean of a batch holds the bias, so that outputs do not depend on it and its gradient in
    training is 0 (Ioffe & Szegedy 2015, section 3.2): C numbers that are kept, sent between processes and moved by
    weight decay alone. Not where the batch norm is constant, or in eval mode inside a model in train: there the bias
    counts. Nor where Linear gives (N, L, C), whose biases are not those of the channels.

    Remedy: ``bias=False``. In a trained model: ``norm.running_mean -= layer.bias`` and ``layer.bias = None`` keep the
    outputs in eval; ``bn.fold(model, example)`` needs the bias and does away with the norm.

    False alarms: a layer that is also used elsewhere with the bias, in a part that could not be traced.
    """
    for layer in subject.trained:
        module = layer.module
        frozen = is_frozen(module) or "use" in frozen_parts(module) or isinstance(module, NormOutsideGradient)
        if frozen or (subject.model.training and not module.training):
            continue
        calls = subject.wiring.of(module)
        sources = [subject.wiring.source(step) for step in calls]
        before = {source.module for source in sources if source is not None and source.module is not None}
        if len(before) != 1 or any(source is None or source.module is None for source in sources):
            continue
        (linear,) = before
        bias = getattr(linear, "bias", None)
        if bias is None or not _adds_bias_per_channel(linear, sources):
            continue
        if all(_reads_alone(subject.wiring, step, module) for step in subject.wiring.of(linear)):
            name = next(source.name for source in sources if source is not None)
            yield Sign(
                str(name),
                f"its bias ({bias.numel()} values) is subtracted again by {layer.name}: no effect, no gradient",
                "make it with bias=False",
                {"bias": bias.numel(), "batch_norm": layer.name},
            )


def _adds_bias_per_channel(linear: nn.Module, steps: list[Step | None]) -> bool:
    # A subclass with a forward of its own may do anything after the bias, and so may a hook.
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    if isinstance(linear, nn.Linear):
        shapes = [step.output_shape for step in steps if step is not None]
        return type(linear).forward is nn.Linear.forward and all(s is None or len(s) == 2 for s in shapes)
    return any(isinstance(linear, kind) and type(linear).forward is kind.forward for kind in CONVOLUTIONS)


def _reads_alone(wiring: Wiring, step: Step, norm: nn.Module) -> bool:
    user = wiring.sole_user(step)
    return (
        user is not None
        and user.module is norm
        and user.inputs[:1] == [step.index]
        and user.inputs.count(step.index) == 1
    )


@rule("BN002", "dropout-before-batch-norm", "warning", needs="wiring")
def dropout_before(subject: Subject) -> Iterator[Sign]:
    """Dropout upstream of a batch norm, with no other normalization between.

    Dropout with probability p keeps the mean and makes of a variance v (v + p mean^2) / (1 - p); the running variance
    learns that one, and eval, without dropout, is normalized with it all the same (Li et al. 2019, "Understanding the
    Disharmony between Dropout and Batch Normalization by Variance Shift", section 3). Activations then come out too
    small by sqrt(1 - p) or more, layer after layer.

    Found for nn.Dropout, 1d to 3d, and F.dropout with p > 0, upstream of a batch norm that normalizes with its batch in
    training and with running statistics in eval. Between may be linear layers, convolutions, activations, pooling,
    reshaping, concatenation: a sum over inputs that are not correlated keeps the ratio. An addition (a residual path
    beside the dropout) dilutes it: then, and for p below 0.2, where the deviation changes by less than 12%, it is an
    info. The search ends at any normalization, attention, product or function that is not known. Alpha dropout, which
    keeps the variance, and drop path, which leaves out whole samples of a branch, are not reported.

    Remedy: put dropout after the last batch norm; or leave it out, as BN regularizes already; or
    ``bn.recalibrate(model, batches)`` after training, which runs without dropout.

    False alarms: layers so wide and inputs so correlated that the shift averages out (wide residual networks, ibid.
    section 4); measure with ``batches`` (BN3xx).
    """
    for layer in subject.trained:
        if not has_statistics(layer.module) or "use" in frozen_parts(layer.module):
            continue
        if subject.model.training and not layer.module.training:
            continue
        found: dict[int, tuple[Step, float, bool, bool]] = {}
        for step in subject.wiring.of(layer.module):
            for source in _dropouts(subject, step):
                found.setdefault(source[0].index, source)
        if not found:
            continue
        dropout, p, direct, diluted = max(found.values(), key=lambda source: (not source[3], source[1], source[2]))
        ratio = 1 / (1 - p)
        yield Sign(
            layer.name,
            f"{dropout.label} (p={p:g}) upstream: a training batch's variance is {'at least' if direct else 'about'} "
            f"{ratio:.3g} times that in eval" + (", before other paths are added" if diluted else ""),
            "put dropout after the last batch norm, or bn.recalibrate(model, batches) after training",
            {"p": p, "ratio": ratio, "direct": direct, "dropout": dropout.label},
            severity="info" if diluted or p < 0.2 else "warning",
        )


def _dropouts(subject: Subject, norm: Step) -> Iterator[tuple[Step, float, bool, bool]]:
    """Dropouts upstream of ``norm``: the step, p, whether only reshaping is between, and whether additions are."""
    wiring = subject.wiring
    seen: set[tuple[int, bool, bool]] = set()
    waiting = [(index, True, False) for index in norm.inputs[:1]]
    while waiting:
        index, direct, diluted = waiting.pop()
        if index == OUTSIDE or (index, direct, diluted) in seen:
            continue
        seen.add((index, direct, diluted))
        step = wiring.steps[index]
        p = _drops(step, subject.model.training)
        if p:
            yield step, p, direct, diluted
        module, function = step.module, "" if step.module is not None else function_name(step.function)
        if isinstance(module, nn.Identity) or p is not None:
            pass
        elif function in ADDITIONS:
            direct, diluted = False, True
        elif isinstance(module, (*PASSED_MODULES, *MIXING)) or function in PASSED_FUNCTIONS or _pools(module):
            direct = direct and (isinstance(module, nn.Flatten) or function in ("flatten", "reshape", "view"))
        else:
            continue
        waiting += [(source, direct, diluted) for source in step.inputs]


def _pools(module: nn.Module | None) -> bool:
    return type(module).__module__ == "torch.nn.modules.pooling"


def _drops(step: Step, training: bool) -> float | None:
    """p of a dropout, 0 where it is off in training; None for what is none."""
    if isinstance(step.module, DROPOUTS):
        off = step.module.p >= 1 or (training and not step.module.training)
        return 0.0 if off else float(step.module.p)
    if step.module is None and function_name(step.function) in DROPOUT_FUNCTIONS:
        if step.arguments is None:
            return 0.0
        called: tuple[tuple[Any, ...], dict[str, Any]] = step.arguments
        p = called[0][1] if len(called[0]) > 1 else called[1].get("p", 0.5)
        return float(p) if isinstance(p, int | float) and 0 < p < 1 else 0.0
    return None


@rule("BN003", "batch-norm-after-last-layer", "warning", needs="wiring")
def after_last_layer(subject: Subject) -> Iterator[Sign]:
    """A batch norm right behind a linear layer gives what the model returns.

    In training every output has the mean beta and the deviation gamma over the batch, whatever the batch: a class that
    fills it, or a target that is large throughout, cannot be said. Logits of one sample depend on the others, and eval
    differs from training by all that one batch differs from another.

    Found where Linear feeds the batch norm and nothing but a softmax, a sigmoid or reshaping follows. Not reported:
    constant layers, layers without gamma and beta, and those where one of the two is frozen, as embeddings have them
    (ArcFace, BNNeck); convolutional outputs.

    Remedy: end with the linear layer.

    False alarms: embeddings that a loss compares with each other (SimCLR's and BYOL's projectors, metric learning),
    where that normalization is wanted.
    """
    wiring = subject.wiring
    for layer in subject.trained:
        if not _affine_learns_whole(layer):
            continue
        for step in wiring.of(layer.module):
            source = wiring.source(step)
            if source is None or not isinstance(source.module, nn.Linear) or not _ends(wiring, step):
                continue
            features = source.module.out_features
            yield Sign(
                layer.name,
                f"gives the model's {features} outputs, behind the linear layer {source.name}: in training they are "
                "normalized over the batch",
                f"leave {layer.name} out: end with the linear layer",
                {"features": features},
            )
            break


def _affine_learns_whole(layer: Layer) -> bool:
    gamma, beta = layer.module._parameters.get("weight"), layer.module._parameters.get("bias")
    return gamma is not None and beta is not None and gamma.requires_grad == beta.requires_grad


_LAST_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
_LAST_FUNCTIONS = frozenset(
    ("softmax", "log_softmax", "sigmoid", "logsigmoid", "squeeze", "flatten", "view", "reshape", "float")
)


def _ends(wiring: Wiring, step: Step) -> bool:
    """Whether the model returns the output of ``step``, as it is or as probabilities."""
    current: Step | None = step
    while current is not None and current.index not in wiring.outputs:
        current = wiring.sole_user(current)
        if current is not None and not (
            isinstance(current.module, _LAST_MODULES)
            or (current.module is None and function_name(current.function) in _LAST_FUNCTIONS)
        ):
            return False
    return current is not None


@rule("BN004", "shared-batch-norm", "warning", needs="wiring")
def shared(subject: Subject) -> Iterator[Sign]:
    """One batch norm is called several times in a forward pass.

    Its running statistics are then one average over inputs of several kinds, which fits none of them in eval, while
    training normalizes each by itself. A warning where different layers feed the calls, or inputs of different sizes
    do: a head that is shared by the levels of a pyramid (EfficientDet shares the convolutions and has batch norms of
    its own for each level). An info where the same layer feeds all of them with inputs of one size, as in a siamese
    network or an unrolled recurrence: only the mix is averaged, and the momentum counts every call. That the model
    holds the layer under several names is no finding by itself.

    Remedy: a batch norm for each place.

    False alarms: a siamese network whose inputs are all of one kind (an info).
    """
    if not subject.wiring.whole:  # a part that was read by itself may never be called
        return
    for layer in subject.trained:
        calls = subject.wiring.of(layer.module)
        if len(calls) < 2 or not has_statistics(layer.module) or "update" in frozen_parts(layer.module):
            continue
        feeders = [_feeder(subject.wiring, step) for step in calls]
        shapes = {step.input_shape[1:] for step in calls if step.input_shape is not None}
        different = len(set(feeders)) > 1
        what = f" by {listed(dict.fromkeys(feeders))}" if different else ""
        sizes = f", on inputs of {len(shapes)} sizes" if len(shapes) > 1 else ""
        yield Sign(
            layer.name,
            f"called {len(calls)} times in a forward pass{what}{sizes}: one average of running statistics for all",
            "a batch norm for each place (copy.deepcopy of it keeps its state)",
            {"calls": len(calls), "feeders": len(set(feeders)), "sizes": len(shapes)},
            severity="warning" if different or len(shapes) > 1 else "info",
        )


def _feeder(wiring: Wiring, step: Step) -> str:
    """The layer with parameters that the first input of ``step`` comes from, past activations and reshaping."""
    current = wiring.source(step)
    for _ in wiring.steps:
        if current is None:
            return "the input"
        if current.module is not None and (current.module._parameters or is_batch_norm(current.module)):
            break
        following = wiring.source(current)
        if len(current.inputs) != 1 and current.module is None and function_name(current.function) in ADDITIONS:
            break
        current = following
    return current.label if current is not None else "the input"
