"""The seam: registers every operator of :mod:`batchnorm.ops.schema` once, for all implementations.

PyTorch's dispatcher chooses the implementation. The reference is registered for every backend at once (as
CompositeExplicitAutograd); a C++ library registers CPU, which outranks it. What stands here belongs to the operator
and not to an implementation, so each of them inherits it: shapes without data (fakes, for torch.compile and export),
gradients, and ``torch.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import ghost, reference
from batchnorm.ops.fakes import FAKES
from batchnorm.ops.gradients import GRADIENTS
from batchnorm.ops.schema import NAMESPACE, SCHEMAS

# Kept for the life of the process: a Library that is collected takes its registrations with it.
_library = torch.library.Library(NAMESPACE, "DEF")


def _laid_out(x: Tensor, result: Tensor) -> Tensor:
    """``result`` with the strides of ``empty_like(x)``, as every implementation and the fakes promise."""
    out = torch.empty_like(x, dtype=result.dtype)
    return result if result.stride() == out.stride() else out.copy_(result)


def _stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.batchnorm.stats(x, mask)


def _normalize(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, sign = reference.normalize(x, *rest)
    return _laid_out(x, y), sign


def _train_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # The statistics go through the dispatcher: a library that has only that kernel is used already.
    y, *statistics = reference.train_forward(x, *rest, stats=_stats)
    return _laid_out(x, y), *statistics


def _grad_input(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx, dresidual = reference.grad_input(grad, x, *rest)
    return _laid_out(x, dx), _residual_laid_out(x, dresidual)


def _train_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dresidual = reference.train_backward(grad, x, *rest)
    return _laid_out(x, dx), dweight, dbias, _residual_laid_out(x, dresidual)


def _ghost_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, saved, sign = ghost.ghost_forward(x, *rest)
    return _laid_out(x, y), saved, sign


def _ghost_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dresidual = ghost.ghost_backward(grad, x, *rest)
    return _laid_out(x, dx), dweight, dbias, _residual_laid_out(x, dresidual)


def _infer(x: Tensor, *rest: Any) -> Tensor:
    return _laid_out(x, reference.infer(x, *rest))


def _train_step(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, saved, sign = reference.train_step(x, *rest)
    return _laid_out(x, y), saved, sign


def _train_step_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx, dweight, dbias, dresidual = reference.train_step_backward(grad, x, *rest)
    return _laid_out(x, dx), dweight, dbias, _residual_laid_out(x, dresidual)


def _residual_laid_out(x: Tensor, dresidual: Tensor) -> Tensor:
    return _laid_out(x, dresidual) if dresidual.dim() == x.dim() else dresidual


# --- vmap -------------------------------------------------------------------------------------------------------------


def _vmap_one_by_one(name: str) -> Callable[..., tuple[Any, Any]]:
    """Runs the operator on each member of the batch.

    The layers do not come here: under a ``torch.func`` transform they call the reference, through which torch's own
    vmap finds its way. This is for direct calls and for vmap inside torch.compile.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.batchnorm, name)
        members = [
            operator(*[arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        if isinstance(members[0], Tensor):
            return torch.stack(members), 0
        outputs = tuple(torch.stack(values) for values in zip(*members, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "stats": reference.stats,
    "normalize": _normalize,
    "train_forward": _train_forward,
    "grad_sums": reference.grad_sums,
    "grad_input": _grad_input,
    "train_backward": _train_backward,
    "update_running": reference.update_running,
    "ghost_forward": _ghost_forward,
    "ghost_backward": _ghost_backward,
    "ghost_update": ghost.ghost_update,
    "infer": _infer,
    "train_step": _train_step,
    "train_step_backward": _train_step_backward,
}


def _register() -> None:
    for name, signature in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, IMPLEMENTATIONS[name], "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, FAKES[name], lib=_library)
        if name in GRADIENTS:
            setup_context, backward = GRADIENTS[name]
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        # Those change buffers: one of many models' has no meaning.
        if name not in ("update_running", "ghost_update", "train_step"):
            torch.library.register_vmap(qualified, _vmap_one_by_one(name), lib=_library)


_register()
