"""Every operator's kernel beside the reference in float64, on one case.

A tolerance counts roundings of float32, in which the kernels compute, at the size of what is added up.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.triton.registration import MODULES
from ops.test_kernels import EPS, Case

KERNELS = SimpleNamespace(**{name: getattr(importlib.import_module(module), name) for name, module in MODULES.items()})
"""By name what CUDA tensors get, here for CPU tensors in the interpreter."""

FLOAT32 = torch.finfo(torch.float32).eps


def assert_close(ours: Tensor, exact: Tensor, error: float, what: str) -> None:
    """Whether each element differs by ``error`` at most, and by a rounding to its own type.

    The interpreter cuts bfloat16 off where a GPU rounds it (test_compiled.py looks for the instruction): a whole unit
    in the last place of that type is allowed here, a half of any other.
    """
    last = torch.finfo(ours.dtype)
    rounding = last.eps if ours.dtype == torch.bfloat16 else last.eps / 2
    allowed = exact.abs() * rounding * (1 + 1e-6) + error + last.smallest_normal * last.eps
    difference = (ours.double() - exact).abs()
    assert bool((difference <= allowed).all()), f"{what}: {difference.max():.3g}, allowed {allowed.max():.3g}"


def assert_equal(results: Any, others: Any) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def assert_statistics(x: Tensor, ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """count, mean and a sum or mean of squared deviations, to roundings of float32 of the deviation."""
    count, mean, spread = exact
    assert torch.equal(ours[0], count)
    assert all(value.dtype == torch.float64 for value in ours)
    deviation = (spread / spread.clamp(min=1e-300)).nan_to_num() + (
        reference.stats(x, None)[2] / max(1, x.numel())
    ).sqrt()
    torch.testing.assert_close(ours[2], spread, rtol=8 * FLOAT32, atol=1e-12)
    assert bool(((ours[1] - mean).abs() <= 2 * FLOAT32 * (deviation + mean.abs() * 1e-7)).all())


def check_forward(case: Case, label: str, *, parts: bool = True) -> tuple[Tensor, ...]:
    """train_forward, and with ``parts`` stats, normalize, infer, train_step; returns statistics and sign."""
    x, wide = case.x, case.wide()
    exact = reference.train_forward(wide.x, *wide.affine, case.mask, EPS, case.activation)
    count, mean, var, invstd = exact[1:5]
    z = reference.train_forward(wide.x, *wide.affine, case.mask, EPS, "none")[0]
    residual = 0.0 if wide.residual is None else wide.residual.abs().max().item()
    size = (max(1.0, z.abs().max().item() + residual) + 1) * case.roundings()

    y, *statistics, sign = KERNELS.train_forward(x, *case.affine, case.mask, EPS, case.activation)
    assert_statistics(x, tuple(statistics[:3]), (count, mean, var))
    torch.testing.assert_close(statistics[3], invstd, rtol=8 * FLOAT32, atol=0)
    results, signs = {"train_forward": y}, [sign]
    if parts:
        assert_statistics(x, KERNELS.stats(x, case.mask), reference.stats(wide.x, case.mask))
        running = torch.zeros(x.size(1)), torch.ones(x.size(1))
        step = KERNELS.train_step(x, *case.affine, case.mask, *running, EPS, 0.1, None, 1, case.activation)
        assert_equal(step, (y, torch.cat([*statistics[1::2], statistics[0].view(1)]), sign))
        moved = torch.zeros(x.size(1)), torch.ones(x.size(1))
        reference.update_running(*moved, statistics[1], statistics[2], statistics[0], 0.1, None, 1)
        torch.testing.assert_close(running, moved, rtol=FLOAT32, atol=1e-12)
        results["normalize"], bits = KERNELS.normalize(x, mean, invstd, *case.affine, case.mask, case.activation)
        results["infer"] = KERNELS.infer(x, mean, var, *case.affine, case.mask, EPS, case.activation)
        signs.append(bits)
    for name, result in results.items():
        assert result.dtype == x.dtype
        assert result.stride() == torch.empty_like(x).stride(), f"{name}: strides"
        assert_close(result, exact[0], size, f"{name} {label}")
        if case.mask is not None:
            assert not result.movedim(1, -1)[~case.mask].any(), f"{name}: padding"
    for bits in signs:
        like = reference.normalize(x, mean, invstd, *case.affine, case.mask, case.activation)[1]
        assert bits.shape == like.shape, f"bytes of sign {label}"
        if bits.numel():
            real = torch.ones_like(z, dtype=torch.bool) if case.mask is None else case.mask.unsqueeze(1).expand_as(z)
            sure = (z.abs() > size) & real
            assert torch.equal(reference._unpack(bits, x)[sure], (z > 0)[sure]), f"sign {label}"
    return count, mean, invstd, sign


def check_backward(
    case: Case, label: str, count: Tensor, mean: Tensor, invstd: Tensor, sign: Tensor, *, parts: bool = True
) -> None:
    """train_backward, and with ``parts`` grad_sums, grad_input and train_step_backward."""
    x, wide = case.x, case.wide()
    # The reference reads the bits in the order of x as it came.
    above = reference._unpack(sign, x) if sign.numel() else None
    wide_sign = None if above is None else reference._pack(above.double() - 0.5, wide.x)
    exact_saved = (wide.grad, wide.x, mean, invstd, *wide.affine, wide_sign, case.mask, case.activation)
    saved = (case.grad, x, mean, invstd, *case.affine, sign if sign.numel() else None, case.mask, case.activation)
    x_hat = reference._x_hat(wide.x, mean, invstd, case.mask)
    dz_size = wide.grad.abs().max().item() * 1.2
    scale = (invstd if wide.weight is None else invstd * wide.weight).abs().max().item()
    far, number = x_hat.abs().max().item() + 1.0, max(1.0, count.item())
    exact_sums = reference.grad_sums(*exact_saved)
    exact_dx, exact_dresidual = reference.grad_input(*exact_saved, count, *exact_sums, True)

    dx, dweight, dbias, dresidual = whole = KERNELS.train_backward(*saved, count, True)
    results = {"train_backward": (dx, dresidual)}
    if parts:
        kept = torch.cat([mean, invstd, count.view(1)])
        assert_equal(KERNELS.train_step_backward(*saved[:2], kept, *saved[4:], True), whole)
        results["grad_input"] = KERNELS.grad_input(*saved, count, *exact_sums, True)
        assert KERNELS.train_backward(*saved, count, False)[3].numel() == 0
        sums = KERNELS.grad_sums(*saved)
        for ours, theirs, size, name in zip(sums, exact_sums, (1.0, far), ("sum_dz", "sum_dz_xhat"), strict=True):
            assert ours.dtype == torch.float64
            assert_close(ours, theirs, number * dz_size * size * case.roundings(), f"{name} {label}")
    for name, (ours, ours_residual) in results.items():
        assert ours.stride() == torch.empty_like(x).stride(), f"{name}: strides"
        assert_close(ours, exact_dx, scale * dz_size * far * far * case.roundings(), f"{name} {label}")
        assert_close(ours_residual, exact_dresidual, dz_size * far * case.roundings(), f"{name}: residual {label}")
    for ours, theirs, parameter in ((dbias, exact_sums[0], case.bias), (dweight, exact_sums[1], case.weight)):
        assert ours.dtype == (torch.float64 if parameter is None else parameter.dtype)
        assert_close(ours, theirs, number * dz_size * far * case.roundings(), f"parameters {label}")
