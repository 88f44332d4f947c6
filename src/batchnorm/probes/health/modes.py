"""Rules about modes: layers that are in another one than their model, or frozen by half."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.nn.recognition import Layer, frozen_parts
from batchnorm.probes.health.layer_state import has_statistics, moves, uses_batch
from batchnorm.probes.health.rule import Sign, rule
from batchnorm.probes.health.subject import Subject


@rule("BN101", "mixed-modes", "warning")
def mixed_modes(subject: Subject) -> Iterator[Sign]:
    """A batch norm is in another mode than its model.

    In train mode inside a model in eval (error): predictions depend on what else is in the batch, and every one moves
    the running statistics. In eval mode inside a model in train (warning): meant as frozen, it is so only until the
    next ``model.train()`` (pytorch #86590); where the whole module that holds it is in eval mode too, as a teacher or a
    fixed trunk would be, this is an info. Not where it is frozen for good: by its class, by ``bn.freeze``, or by a
    ``train`` of its own or of a module around it.

    Remedy: ``model.eval()``; ``bn.freeze(model, layers)``.

    False alarms: test-time adaptation that puts the batch norms of an eval model into train mode on purpose.
    """
    for layer in subject.trained:
        name, module = layer.name, layer.module
        if module.training == subject.model.training or not has_statistics(module):
            continue
        if not subject.model.training:
            if uses_batch(module):
                yield Sign(
                    name,
                    "in train mode inside a model in eval mode: predictions depend on their batch and move statistics",
                    "model.eval(), which puts every layer into eval mode",
                    severity="error",
                )
            continue
        around = _around(subject, layer)
        if any(_trains_in_its_own_way(part) for part in [module, *around]):
            continue
        whole = [part for part in around if part is not subject.model and not part.training]
        yield Sign(
            name,
            "in eval mode inside a model in train mode: the next model.train() unfreezes it"
            + (", with the module around it" if whole else ""),
            f"bn.freeze(model, {name!r}) freezes it for good; to train it, model.train(); to predict, model.eval()",
            severity="info" if whole else "warning",
        )


def _around(subject: Subject, layer: Layer) -> list[nn.Module]:
    """The modules that hold the layer, the innermost first, the model last."""
    keys = layer.name.removeprefix(subject.prefix).split(".")
    return [subject.model.get_submodule(".".join(keys[:length])) for length in range(len(keys) - 1, -1, -1)]


def _trains_in_its_own_way(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train or "train" in module.__dict__


@rule("BN102", "half-frozen", "warning")
def half_frozen(subject: Subject) -> Iterator[Sign]:
    """gamma and beta are frozen, but the running statistics go on moving.

    Found where all of gamma and beta require no gradient while the layer, in train mode, normalizes with its batch and
    moves its running statistics: ``requires_grad_(False)`` freezes parameters, and statistics are none (pytorch #86590,
    Lightning #15063). What was to stay as it was pretrained drifts to the new data.

    The other halves are no faults and are not reported: running statistics that are frozen while gamma and beta learn
    (detection models train so), and one of gamma and beta frozen alone.

    Remedy: ``bn.freeze(model)``.

    False alarms: a momentum encoder (MoCo, BYOL) has no gradient and normalizes with its batches on purpose. What
    ``bn.freeze(..., use=False)`` was asked for is not reported.
    """
    for layer in subject.trained:
        parameters = [kept for key, kept in layer.module._parameters.items() if kept is not None]
        if (
            parameters
            and not any(kept.requires_grad for kept in parameters)
            and moves(layer.module)
            and "affine" not in frozen_parts(layer.module)
        ):
            yield Sign(
                layer.name,
                "gamma and beta require no gradient, but the running statistics still move with every batch",
                f"bn.freeze(model, {layer.name!r})",
            )


@rule("BN103", "no-running-statistics", "warning")
def no_running_statistics(subject: Subject) -> Iterator[Sign]:
    """Running statistics that are not kept, or never move.

    Without buffers (``track_running_stats=False`` when the layer was made) eval normalizes with its batch: a prediction
    depends on what else is in the batch, and batches of one sample may fail. With buffers, but ``track_running_stats``
    set to False afterwards, eval uses the buffers all the same, which is not what most expect, and training no longer
    moves them. ``momentum=0`` on a layer in train mode does the same.

    Remedy: ``track_running_stats=True`` and ``bn.recalibrate(model, batches)``; where statistics of the input itself
    are meant, ``bn.convert(model, to="instance")`` or ``to="group"``; to freeze, ``bn.freeze(model)``.

    False alarms: layers whose batch in eval is as large and as mixed as in training, by intention (style transfer,
    generators, TENT). Layers whose update :func:`batchnorm.freeze` has frozen are not reported.
    """
    for layer in subject.trained:
        module = layer.module
        if "update" in frozen_parts(module):
            continue
        if not has_statistics(module):
            yield Sign(
                layer.name,
                "has no running statistics: in eval mode too it normalizes with the batch that it is given",
                "make it with track_running_stats=True, then train or bn.recalibrate(model, batches); where samples "
                'are to be normalized one by one, bn.convert(model, to="instance") or to="group"',
            )
        elif not getattr(module, "track_running_stats", True):
            yield Sign(
                layer.name,
                "track_running_stats is False but the buffers are there: eval uses them, and training leaves them",
                "set track_running_stats = True and bn.recalibrate(model, batches); to freeze, bn.freeze(model)",
            )
        elif module.training and getattr(module, "momentum", None) == 0:
            yield Sign(
                layer.name,
                "momentum is 0: the running statistics never move",
                "set momentum to 0.1 and bn.recalibrate(model, batches); to freeze, bn.freeze(model)",
                {"momentum": 0.0},
            )
