"""A trial on each card before its kernels are trusted: two training steps held against the reference. Imports Triton.

What tests on other machines cannot show (programs that meet, rounding, this card, this driver) is tried here once a
process and device, on tensors of a few hundred kilobytes; Triton keeps what it compiled for the next process.
"""

from __future__ import annotations

import torch

from batchnorm.ops import reference
from batchnorm.ops.triton import backward, forward

# Fewer channels than programs, so that programs share them, and uneven tails.
SHAPE = (32, 80, 13, 9)
# With the roundings that a difference may have, at the size of the largest value: sums are of float32 in both.
_CASES = ((torch.float32, torch.contiguous_format, 64), (torch.bfloat16, torch.channels_last, 2))
_NAMES = ("y", "count", "mean", "var", "invstd", "dx", "dweight", "dbias", "the residual's gradient")


def run(device: torch.device) -> None:
    """Take the steps on ``device`` and compare.

    Raises:
        RuntimeError: a kernel's result differs from the reference's by more than rounding, or is not finite.
    """
    # A generator of its own: a training run must draw the same numbers whether or not a card was tried.
    generator = torch.Generator().manual_seed(0)
    for dtype, memory, roundings in _CASES:
        x, residual, grad = (
            (torch.randn(SHAPE, generator=generator) + shift).to(device, dtype).contiguous(memory_format=memory)
            for shift in (3.0, 0.0, 0.0)
        )
        weight, bias = (torch.randn(SHAPE[1], generator=generator).to(device) for _ in range(2))
        affine = (weight, bias, residual)
        *ours, sign = forward.train_forward(x, *affine, None, 1e-5, "relu")
        _, count, mean, _, invstd = ours
        ours += backward.train_backward(grad, x, mean, invstd, *affine, sign, None, "relu", count, True)

        wide = weight.double(), bias.double(), residual.double()
        *exact, wide_sign = reference.train_forward(x.double(), *wide, None, 1e-5, "relu")
        _, count, mean, _, invstd = exact
        exact += reference.train_backward(
            grad.double(), x.double(), mean, invstd, *wide, wide_sign, None, "relu", count, True
        )
        for name, got, want in zip(_NAMES, ours, exact, strict=True):
            # Where z is next to 0 rounding decides whether ReLU lets its gradient through: not every element counts.
            off = float((got.double() - want).abs().flatten().quantile(0.999) / want.abs().max())
            allowed = roundings * torch.finfo(dtype).eps
            if not off <= allowed:  # NaN too
                kind = str(dtype).removeprefix("torch.")
                raise RuntimeError(
                    f"a training step in {kind} differs from the reference by {off:.1e} of the largest value in "
                    f"{name}, more than {allowed:.1e}"
                )
