"""The shapes, types and strides of the operators' results, for torch.compile and export: one fake an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.schema import needs_sign, runs, statistics_dtype


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.size(1), dtype=statistics_dtype(x.device))


def _scalar(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=statistics_dtype(x.device))


def _sign(x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    _, number, length = runs(x)
    size = number * ((length + 7) // 8) if needs_sign(activation, residual) else 0
    return x.new_empty(size, dtype=torch.uint8)


def stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _scalar(x), _channels(x), _channels(x)


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _sign(x, residual, activation)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, ...]:
    channels = (_channels(x), _channels(x), _channels(x))
    return torch.empty_like(x), _scalar(x), *channels, _sign(x, residual, activation)


def grad_sums(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def grad_input(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if rest[-1] else x.new_empty(0)


def train_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dweight, dbias = (
        _channels(x) if parameter is None else x.new_empty(x.size(1), dtype=parameter.dtype)
        for parameter in (weight, bias)
    )
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x) if rest[-1] else x.new_empty(0)


def infer(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def train_step(x: Tensor, weight: Any, bias: Any, residual: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    saved = x.new_empty(2 * x.size(1) + 1, dtype=statistics_dtype(x.device))
    return torch.empty_like(x), saved, _sign(x, residual, rest[-1])


def train_step_backward(
    grad: Tensor, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return train_backward(grad, x, saved, saved, weight, bias, *rest)


def ghost_forward(
    x: Tensor,
    weight: Any,
    bias: Any,
    residual: Tensor | None,
    mask: Any,
    size: int,
    ghosts: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, ...]:
    saved = x.new_empty(ghosts, 3 * x.size(1) + 1, dtype=statistics_dtype(x.device))
    return torch.empty_like(x), saved, _sign(x, residual, activation)


def update_running(*_: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "stats": stats,
    "normalize": normalize,
    "train_forward": train_forward,
    "grad_sums": grad_sums,
    "grad_input": grad_input,
    "train_backward": train_backward,
    "update_running": update_running,
    "ghost_forward": ghost_forward,
    "ghost_backward": train_step_backward,
    "ghost_update": update_running,
    "infer": infer,
    "train_step": train_step,
    "train_step_backward": train_step_backward,
}
