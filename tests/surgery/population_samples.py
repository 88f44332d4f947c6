"""Small networks with trained-like statistics, and what their batch norms are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from oracles.model_zoo import randomize_statistics


def convolutional(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Three batch norms in a chain, dropout among them; for (N, 3, 8, 8)."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8, momentum=0.01), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(72, 10), nn.BatchNorm1d(10, momentum=None), nn.Tanh(), nn.Linear(10, 4)),
    )
    return randomize_statistics(net).to(dtype)


def images(n: int = 53, dtype: torch.dtype = torch.float64) -> Tensor:
    """Far from normal: each image has a brightness of its own, so that means of batches differ."""
    generator = torch.Generator().manual_seed(2)
    brightness = 3 * torch.randn(n, 1, 1, 1, generator=generator)
    return (torch.randn(n, 3, 8, 8, generator=generator) + brightness.cumsum(0) / n**0.5 + 5).to(dtype)


def norms(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def inputs(model: nn.Module, run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """What each batch norm is given, call by call, as (values, C) in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in norms(model)}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].detach().double().movedim(1, -1).flatten(0, -2))

    handles = [norm.register_forward_pre_hook(keep(name)) for name, norm in norms(model).items()]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def in_training(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """What batch norms are given when they normalize with their batches and everything else is in eval mode."""
    twin = copy.deepcopy(model).eval()
    for norm in norms(twin).values():
        norm.train()
    seen = inputs(twin, lambda: [twin(batch) for batch in batches])
    return {name: torch.cat(rows) for name, rows in seen.items()}


def assert_population(model: nn.Module, values: dict[str, Tensor], rtol: float = 1e-12) -> None:
    """The running statistics are mean and unbiased variance of ``values``."""
    for name, norm in norms(model).items():
        scale = float(values[name].abs().max())
        mean, var = norm.running_mean.double(), norm.running_var.double()
        torch.testing.assert_close(mean, values[name].mean(0), rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(var, values[name].var(0), rtol=10 * rtol, atol=rtol * scale**2)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a failure must leave as it was."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "momentum": [norm.momentum for norm in norms(model).values()],
        "random": torch.get_rng_state(),
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    assert now.keys() == before.keys()
    for name, tensor in before["tensors"].items():
        torch.testing.assert_close(now["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(now["random"], before["random"])
    for what in ("objects", "modes", "hooks", "momentum"):
        assert now[what] == before[what], what
