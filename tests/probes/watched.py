"""Models and runs that the tests of watching share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn


def mlp(norm=nn.BatchNorm1d, act=nn.Sigmoid) -> nn.Sequential:
    """6 -> 5 -> 5 -> 3 with a norm and an activation after the first two layers."""
    return nn.Sequential(nn.Linear(6, 5), norm(5), act(), nn.Linear(5, 5), norm(5), act(), nn.Linear(5, 3))


def convnet() -> nn.Sequential:
    """Two convolutions with batch norm and ReLU in place, dropout, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3), bn.nn.BatchNorm2d(5, activation="relu"), nn.Flatten(), nn.Linear(5 * 16, 3),
    )  # fmt: skip


class Checkpointed(nn.Module):
    """Whose first half is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = mlp(act=nn.ReLU), nn.BatchNorm1d(3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=self.reentrant))


class Twice(nn.Module):
    """One layer called twice a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(10 * self.norm(x) + 5)


def inputs(model: nn.Module) -> Tensor:
    """A batch that fits one of the models here."""
    first = next(module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm1d))
    if isinstance(first, nn.Conv2d):
        return torch.randn(8, 3, 8, 8)
    return torch.randn(20, first.in_features if isinstance(first, nn.Linear) else first.num_features)


def train(model: nn.Module, x: Tensor, steps: int = 3, autocast: bool = False) -> list[Tensor]:
    """Some steps of SGD: every output, gradient and state on the way, and the state of the random numbers."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    x = x.clone().requires_grad_()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
            loss = y.float().square().mean() + y.float().sum() / 7
        loss.backward()
        seen += [y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        seen += [tensor.clone() for tensor in model.state_dict().values()]
    return [*seen, x.grad.clone(), torch.get_rng_state()]


def same_with_and_without(model: nn.Module, x: Tensor, autocast: bool = False, **options) -> bn.probes.Watch:
    """Train twice from the same state, once watched: everything must be equal, bit for bit."""
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    without = train(twin, x, autocast=autocast)
    torch.manual_seed(5)
    with bn.watch(model, every=2, **options) as watch:
        with_it = train(model, x, autocast=autocast)
    assert len(without) == len(with_it)
    for first, second in zip(without, with_it, strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    return watch
