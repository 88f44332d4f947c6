"""How a candidate is measured: a step of torch's layers, of ours, of oneDNN's, and the floor."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import batchnorm as bn
from benchmarks import onednn
from benchmarks.layers.cases import ADD, BN, LAST, RELU, Case

CLASSES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d"}


class AddRelu(torch.nn.Module):
    """The end of a residual block as it is commonly written."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(self.norm(x) + residual)


def torch_module(case: Case, in_place: bool = False) -> torch.nn.Module:
    """torch's layers for the case."""
    norm = getattr(torch.nn, CLASSES[len(case.shape)])(case.shape[1])
    if case.layer == BN:
        return norm
    return AddRelu(norm) if case.layer == ADD else torch.nn.Sequential(norm, torch.nn.ReLU(in_place))


def our_module(case: Case) -> torch.nn.Module:
    """Ours."""
    activation = None if case.layer == BN else "relu"
    return getattr(bn.nn, CLASSES[len(case.shape)])(case.shape[1], activation=activation)


def family(case: Case) -> dict[str, torch.nn.Module]:
    """Our other layers that a case may name."""
    dims, features = CLASSES[len(case.shape)].removeprefix("BatchNorm"), case.shape[1]
    activation = None if case.layer == BN else "relu"
    return {
        "ghost": getattr(bn.nn, f"GhostBatchNorm{dims}")(
            features, virtual_batch_size=max(1, case.shape[0] // 4), activation=activation
        ),
        "renorm": getattr(bn.nn, f"BatchRenorm{dims}")(features, activation=activation),
        "frozen": getattr(bn.nn, f"FrozenBatchNorm{dims}")(features, activation=activation),
    }


class Masked(torch.nn.Module):
    """Ours, with a mask that leaves out the end of each sample: a fifth of all positions."""

    def __init__(self, norm: torch.nn.Module, case: Case) -> None:
        super().__init__()
        self.norm = norm
        n, _, *positions = case.shape
        flat = torch.ones(n, max(1, torch.Size(positions).numel()), dtype=torch.bool)
        if positions:
            flat[:, flat.size(1) * 4 // 5 :] = False
        else:
            flat[n * 4 // 5 :] = False
        self.mask = flat.view(n, *positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, mask=self.mask)


def data(case: Case) -> Tensor:
    """Random values in the case's memory order."""
    x = torch.randn(case.shape).to(case.dtype)
    if case.layout != LAST:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def step(case: Case, module: Any, ours: bool) -> Callable[[], None]:
    """A training step: forward, backward from a ready gradient, gradients dropped. In inference, the forward."""
    x = data(case)
    if not case.training:
        module.eval()

        def infer() -> None:
            with torch.no_grad():
                module(x)

        return infer
    x.requires_grad_()
    dy, residual = data(case), data(case).requires_grad_() if case.layer == ADD else None

    def run() -> None:
        x.grad = None
        if residual is None:
            module(x).backward(dy)
            return
        residual.grad = None
        (module(x, residual=residual) if ours else module(x, residual)).backward(dy)

    return run


def floor(case: Case) -> Callable[[], None]:
    """The minimum bytes: one read and one write (x + 1), two reads and one write (dy + x); outputs made beforehand.

    With torch's own loops and number of threads, into memory that has been touched: no page faults.
    """
    x, dy, y, dx = data(case), data(case), data(case), data(case)

    def run() -> None:
        torch.add(x, 1.0, out=y)
        torch.add(dy, x, out=dx)

    return run


class OneDnn:
    """A case of oneDNN's driver, to be timed like a function."""

    def __init__(self, driver: onednn.Driver, case: Case, layout: str) -> None:
        self.driver, self.arguments = driver, (as_image(case.shape), layout, case.layer == RELU)

    def seconds(self, repeats: int) -> float:
        # All candidates share one driver; it makes the data anew only when the case has changed.
        if getattr(self.driver, "case", None) != self.arguments:
            self.driver.prepare(*self.arguments)
            self.driver.case = self.arguments
        return self.driver.seconds(repeats)


def as_image(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(N, C) and (N, C, L) as images of height 1."""
    n, c, *positions = shape
    h, w = (1, *positions, 1)[-2:] if len(positions) < 2 else positions
    return n, c, h, w


def candidates(case: Case, drivers: dict[str, onednn.Driver]) -> tuple[dict[str, Any], dict[str, str]]:
    """Everything to be timed for a case by name, and why what is missing is missing."""
    timed: dict[str, Any] = {
        "torch": step(case, torch_module(case), ours=False),
        "ours": step(case, our_module(case), ours=True),
    }
    notes: dict[str, str] = {}
    if "in place" in case.peers:
        timed["torch in place"] = step(case, torch_module(case, in_place=True), ours=False)
    for name, module in family(case).items():
        if name in case.peers:
            timed[name] = step(case, module, ours=True)
    if "masked" in case.peers:
        timed["masked"] = step(case, Masked(our_module(case), case), ours=True)
    if "floor" in case.peers:
        timed["floor"] = floor(case)
    if "onednn" in case.peers:
        for layout in ("nhwc", "blocked"):
            name = f"oneDNN {layout}"
            if layout in drivers:
                timed[name] = OneDnn(drivers[layout], case, layout)
            else:
                notes[name] = onednn.missing()
    if "compiled" in case.peers:
        for name, module, ours in (("torch", torch_module(case), False), ("ours", our_module(case), True)):
            compiled = step(case, torch.compile(module, dynamic=False), ours)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    compiled()
                timed[f"{name} compiled"] = compiled
            except Exception as error:  # noqa: BLE001 - no compiler, or one that torch cannot use
                notes[f"{name} compiled"] = type(error).__name__
    return timed, notes
