"""Torch's own samples of ``nn.functional.batch_norm``, through our functional: values, gradients, averages."""

from __future__ import annotations

import warnings

import pytest
import torch

import batchnorm as bn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's testing tools are not held to our standard
    from torch.testing._internal.common_methods_invocations import op_db

(INFO,) = (info for info in op_db if info.name == "nn.functional.batch_norm" and not info.variant_test_name)


def samples(dtype):
    torch.manual_seed(5)
    return list(INFO.sample_inputs("cpu", dtype, requires_grad=True))


def run(function, sample):
    running_mean, running_var, weight, bias = (None if t is None else t.detach().clone() for t in sample.args)
    leaves = [t.detach().clone().requires_grad_() for t in (sample.input, weight, bias) if t is not None and t.numel()]
    x = leaves[0] if sample.input.numel() else sample.input.detach().clone()
    rest = iter(leaves[1:] if sample.input.numel() else leaves)
    weight, bias = (t if t is None or not t.numel() else next(rest) for t in (weight, bias))
    y = function(x, running_mean, running_var, weight, bias, **sample.kwargs)
    slopes = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y * slopes).sum(), leaves) if leaves else ()
    return y.detach(), gradients, (running_mean, running_var)


def test_there_are_samples():
    assert len(samples(torch.float32)) >= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", range(len(samples(torch.float32))))
def test_sample(index, dtype):
    ours, theirs = (
        run(function, samples(dtype)[index])
        for function in (bn.nn.functional.batch_norm, torch.nn.functional.batch_norm)
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(ours, theirs, **tolerance)
