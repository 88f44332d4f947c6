"""A model's batch norms and layers for a :class:`Plan`, and how a batch norm leaves a model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.nn.recognition import Layer, batch_norms
from batchnorm.probes.wiring import Step, Wiring
from batchnorm.surgery.folding.layers import can_take, hooked, norm_taker, taker_of, tied
from batchnorm.surgery.folding.norms import affine_of, check_forward, rest_of
from batchnorm.surgery.folding.plan import Norm, Plan
from batchnorm.surgery.folding.taking import Left, Taker


def plan_of(model: nn.Module, wiring: Wiring) -> Plan:
    """What there is to fold in ``model``, to which the plan's ``run`` does it."""
    named = dict(model.named_modules(remove_duplicate=False))
    owned = dict((*model.named_parameters(), *model.named_buffers()))
    read = {id(owned[name]) for step in wiring.steps for name in step.reads}
    shared = tied(model) | read
    takers: dict[nn.Module, Taker] = {}
    at: dict[int, Taker] = {}
    for step in wiring.steps:
        if step.module is not None and can_take(step.module):
            if step.module not in takers:
                takers[step.module] = taker_of(step.name or "", step.module, shared)
            at[step.index] = takers[step.module]
    norms = [_norm(model, layer, wiring, shared, read) for layer in batch_norms(model, frozen=True)]
    norms.sort(key=lambda norm: norm.calls[0].index if norm.calls else len(wiring.steps))

    def guard(norm: Norm, taker: Taker, between: list[Step]) -> None:
        # A container that holds only one of the two sees other numbers come in or go out.
        apart = _around(norm.name) ^ _around(taker.name)
        watched = [named[name] for name in apart if name in named]
        if hooked([*watched, *(step.module for step in between if step.module is not None)]):
            raise Left(f"a hook between {taker.label} and it would see other numbers")

    return Plan(wiring, at, norms, guard)


def _norm(model: nn.Module, layer: Layer, wiring: Wiring, shared: set[int], read: set[int]) -> Norm:
    module, kind = layer.module, type(layer.module).__name__
    calls, rest = wiring.of(module), rest_of(module)

    def remove() -> None:
        rest.train(module.training)
        for name in layer.names:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, rest)

    plain = isinstance(rest, nn.Identity)
    norm = Norm(layer.name, kind, calls, lambda: affine_of(module), plain, remove)
    try:
        if not calls:
            raise Left("the example did not lead through it")
        for call in calls:
            given = [leaf for leaf in pytree.tree_leaves(call.arguments) if leaf is not None]
            if len(given) != 1:
                raise Left("it is called with more than its input: a mask, a residual or parameters")
            check_forward(module, affine_of(module), rest, len(call.input_shape or ()))
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(id(tensor) in read for tensor in own):
            raise Left("its numbers are also read by a function")
        if "" in layer.names:
            raise Left("it is the whole model")
    except Left as left:
        norm.reasons, norm.blocked = [str(left)], True
    else:
        if plain and isinstance(getattr(module, "running_mean", None), Tensor):
            norm.as_taker = norm_taker(layer.name, module, len(calls[0].input_shape or ()), shared)
    return norm


def _around(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:number]) for number in range(1, len(parts) + 1)}
