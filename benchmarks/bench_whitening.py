"""Whitening layers beside straightforward torch: a training step, forward and backward, of DBN and IterNorm.

The peers do what the papers write, in float32, with autograd's tape: channels to the front, centre, covariance, W by
``torch.linalg.eigh`` or by Newton's loop, one product, back. Each side also moves its running statistics. float32 input
with gradients of input, gamma and beta; ratios from one interleaved run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import batchnorm as bn
from benchmarks import harness
from benchmarks.harness import interleave, save, show

SHAPES = (((64, 64, 28, 28), 16), ((64, 64, 28, 28), 64), ((128, 256, 7, 7), 64), ((256, 100), 20), ((4096, 256), 64))
QUICK = (((64, 64, 28, 28), 16), ((256, 100), 20))
ROUNDS = 15


class Peer(nn.Module):
    """What both peers share; ``root`` makes W of a covariance with eps on its diagonal."""

    def __init__(self, channels: int, group_size: int, root: Callable[[Tensor], Tensor], eps: float = 1e-5) -> None:
        super().__init__()
        self.group_size, self.root, self.eps, self.momentum = group_size, root, eps, 0.1
        groups = channels // group_size
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(groups, group_size, 1))
        self.register_buffer("running_cov", torch.eye(group_size).repeat(groups, 1, 1))
        self.register_buffer("eye", torch.eye(group_size))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.transpose(0, 1)
        rows = channels.reshape(-1, self.group_size, x.numel() // x.size(1))
        mean = rows.mean(-1, keepdim=True)
        centred = rows - mean
        cov = centred @ centred.mT / rows.size(-1)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_cov.lerp_(cov, self.momentum)
        white = self.root(cov + self.eps * self.eye) @ centred
        y = white.reshape(channels.shape).transpose(0, 1)
        shape = [1, -1] + [1] * (x.dim() - 2)
        return y * self.weight.view(shape) + self.bias.view(shape)


def by_eigenvalues(cov: Tensor) -> Tensor:
    """Huang et al. (2018): D L^(-1/2) D^T."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT


def by_newton(cov: Tensor, iterations: int = 5) -> Tensor:
    """Huang et al. (2019), algorithm 1."""
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    normal = cov / trace
    p = torch.eye(cov.size(-1)).expand_as(cov)
    for _ in range(iterations):
        p = 0.5 * (3 * p - p @ p @ p @ normal)
    return p / trace.sqrt()


LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor], Tensor]]] = {
    "DBN": (bn.nn.DecorrelatedBatchNorm, by_eigenvalues),
    "IterNorm": (bn.nn.IterNorm, by_newton),
}


def measure(name: str, shape: tuple[int, ...], group_size: int, channels_last: bool) -> dict[str, object]:
    """One row of the table."""
    make, root = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    dy = torch.randn_like(x)

    def step(layer: nn.Module) -> Callable[[], object]:
        leaf = x.clone().requires_grad_()
        wanted = [leaf, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(leaf), wanted, dy)

    calls = {"ours": step(make(shape[1], group_size)), "torch": step(Peer(shape[1], group_size, root))}
    ms = {each: 1e3 * timing.median for each, timing in interleave(calls, rounds=ROUNDS).items()}
    return {
        "layer": name,
        "shape": "x".join(map(str, shape)),
        "group size": group_size,
        "layout": "channels_last" if channels_last else "contiguous",
        "ours ms": ms["ours"],
        "torch ms": ms["torch"],
        "times faster": ms["torch"] / ms["ours"],
    }


def main() -> None:
    rows = [
        measure(name, shape, group_size, channels_last)
        for name in LAYERS
        for shape, group_size in (QUICK if harness.options.quick else SHAPES)
        for channels_last in ((False, True) if len(shape) == 4 else (False,))
    ]
    show("Whitening: a training step, forward and backward, float32, beside straightforward torch", rows)
    save("whitening", rows)


if __name__ == "__main__":
    main()
