"""A training step through the operators, ours and the reference's, for tests that compare the two."""

from __future__ import annotations

import torch

from batchnorm.ops import reference

EPS = 1e-5


def step(ops, x, grad, activation="relu", residual=None, mask=None):
    """Forward and backward: y, mean, var, dx, dweight, dbias, and the residual's gradient."""
    y, count, mean, var, invstd, sign = ops.train_forward(x, None, None, residual, mask, EPS, activation)
    saved = (mean, invstd, None, None, residual, sign, mask, activation, count, residual is not None)
    return y, mean, var, *ops.train_backward(grad, x, *saved)


def ours(*args, **kwargs):
    return step(torch.ops.batchnorm, *args, **kwargs)


def exact(*args, **kwargs):
    return step(reference, *args, **kwargs)


def assert_same(results, expected, rtol=2e-5, atol=2e-5):
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=rtol, atol=atol, equal_nan=True)
