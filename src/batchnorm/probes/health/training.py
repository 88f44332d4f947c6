"""Rules about how a model is trained: its optimizer, and the processes that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import distributed, nn

from batchnorm.nn.ghost import _GhostBatchNormLayer
from batchnorm.nn.recognition import Layer
from batchnorm.nn.renorm import _BatchRenormLayer
from batchnorm.nn.sync import SyncBatchNorm
from batchnorm.probes.feeding import size_of
from batchnorm.probes.health.layer_state import listed
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Subject

SMALL_BATCH = 8


@rule("BN107", "weight-decay-on-batch-norm", "info", needs="optimizer")
def weight_decay(subject: Subject) -> Iterator[Sign]:
    """gamma or beta is in a parameter group with weight decay.

    One finding for each such group, of the parameters that learn. Decay pulls gamma to 0, where it takes signal away
    without limiting what the network can express, as the next layer makes up for it; recipes that leave out gamma, beta
    and biases train somewhat better (He et al. 2019, "Bag of Tricks", section 3.1; Jia et al. 2018). A parameter that
    is frozen but still has a gradient (warning) is moved by the optimizer all the same, decay included.

    Remedy: two parameter groups, ``weight_decay=0`` for parameters of one dimension; ``requires_grad_(False)`` together
    with ``parameter.grad = None``.

    False alarms: recipes that decay everything and were tuned so; torchvision's do.
    """
    assert subject.groups is not None
    for number, group in enumerate(subject.groups):
        inside = {id(parameter) for parameter in group["params"]}
        decay = group.get("weight_decay", 0)
        decay = float(decay) if decay is not None else 0.0
        found = [
            layer.name
            for layer in subject.trained
            if any(kept.requires_grad and id(kept) in inside for kept in _parameters(layer).values())
        ]
        if decay > 0 and found:
            yield Sign(
                "",
                f"gamma or beta of {_layers(len(found))} in parameter group {number} with weight_decay {decay:g} "
                f"({listed(found)})",
                "give the optimizer two groups: parameters with dim() <= 1 and weight_decay=0, and the others",
                {"group": number, "weight_decay": decay, "layers": len(found)},
            )
        for layer in subject.trained:
            stale = [
                key
                for key, kept in _parameters(layer).items()
                if id(kept) in inside and not kept.requires_grad and kept.grad is not None
            ]
            if stale:
                yield Sign(
                    layer.name,
                    f"{' and '.join(stale)} frozen, but with a gradient left, and in parameter group {number}: the "
                    "optimizer still moves what it holds",
                    f"bn.freeze(model, {layer.name!r}), which drops the gradient; or optimizer.zero_grad()",
                    {"group": number, "weight_decay": decay},
                    severity="warning",
                )


@rule("BN108", "unsynchronized", "info")
def unsynchronized(subject: Subject) -> Iterator[Sign]:
    """Each of several processes normalizes with its own part of the batch.

    Found for batch norms in train mode that are not synchronised, where the model is in DistributedDataParallel with
    more than one process, in DataParallel on more than one device, or torch.distributed is initialised with more than
    one process. An info, as large parts are good enough; a warning where ``batches`` show that a process has 8 samples
    or fewer: from 8 downwards errors rise (Wu & He 2018, "Group Normalization", figure 1). The running statistics are
    those of one process in the end, whichever writes the checkpoint. A synchronised layer whose process group has one
    member is found too (warning).

    Ghost batch norm and batch renormalization are made for small parts and not reported.

    Remedy: ``bn.convert(model, to="sync")``.

    False alarms: parts that are large enough (the info says no more than that they are parts).
    """
    world, where = _processes(subject.root)
    if world < 2:
        return
    active = [layer for layer in subject.trained if layer.module.training]
    alone = [layer.name for layer in active if not isinstance(layer.module, _NOT_ALONE)]
    if alone:
        size = size_of(subject.example) if subject.batches is not None else None
        small = size is not None and size <= SMALL_BATCH
        yield Sign(
            "",
            f"{_layers(len(alone))} not synchronised over the {world} {where} ({listed(alone)}): each normalizes with "
            + (f"its own {size} samples" if small else "its own part of the batch"),
            'bn.convert(model, to="sync") before the model is wrapped',
            {"world_size": world, "layers": len(alone), **({"batch": size} if size is not None else {})},
            severity="warning" if small else "info",
        )
    for layer in active:
        group: Any = getattr(layer.module, "process_group", None)
        if isinstance(group, distributed.ProcessGroup) and distributed.get_world_size(group) == 1:
            yield Sign(
                layer.name,
                f"synchronised over a process group of one, of {world} {where}: it shares its statistics with nobody",
                "give it the process group of all who share the batch, or None for all processes",
                {"world_size": world, "group_size": 1},
                severity="warning",
            )


_NOT_ALONE = (nn.SyncBatchNorm, SyncBatchNorm, _GhostBatchNormLayer, _BatchRenormLayer)


def _processes(root: nn.Module) -> tuple[int, str]:
    """How many share the batch of ``root``, and what they are."""
    if isinstance(root, nn.DataParallel):
        return len(root.device_ids), "devices"
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1, "processes"
    group = root.process_group if isinstance(root, nn.parallel.DistributedDataParallel) else None
    return distributed.get_world_size(group), "processes"


@rule("BN110", "not-in-optimizer", "warning", needs="optimizer")
def not_in_optimizer(subject: Subject) -> Iterator[Sign]:
    """gamma or beta requires a gradient, but the optimizer does not hold it, though it holds its neighbours.

    Neighbours are the parameters of the modules that the same module holds: the convolution beside the batch norm. The
    common causes are an optimizer that was made before the layer (before a conversion, or the first batch of a lazy
    layer), and a rule for groups that forgets a kind of parameter. The layer then never learns, without a word.

    Remedy: make the optimizer after all changes to the model, or ``optimizer.add_param_group``.

    False alarms: training of convolutions alone, on purpose, without ``requires_grad_(False)`` on the rest.
    """
    assert subject.groups is not None
    known = {id(parameter) for group in subject.groups for parameter in group["params"]}
    for layer in subject.trained:
        missing = [k for k, kept in _parameters(layer).items() if kept.requires_grad and id(kept) not in known]
        if not missing:
            continue
        path = layer.name.removeprefix(subject.prefix)
        if not path:
            continue
        holder = subject.model.get_submodule(path.rpartition(".")[0])
        beside = {id(kept) for child in holder.children() if child is not layer.module for kept in child.parameters()}
        if beside & known:
            yield Sign(
                layer.name,
                f"{' and '.join(missing)} of the layer not in the optimizer, which holds its neighbours' parameters",
                "make the optimizer after all changes to the model, or optimizer.add_param_group",
                {"parameters": missing},
            )


def _parameters(layer: Layer) -> dict[str, nn.Parameter]:
    return {key: kept for key, kept in layer.module._parameters.items() if kept is not None}


def _layers(number: int) -> str:
    return "1 batch norm is" if number == 1 else f"{number} batch norms are"
