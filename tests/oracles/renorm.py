"""Batch renormalization in float64 NumPy, written from the paper. Imports nothing of the package.

Source: Ioffe (2017), "Batch Renormalization", Algorithm 1 and the gradients below it (r and d are constants).
"""

from __future__ import annotations

import numpy as np

from oracles import batch_norm


def corrections(x, running_mean, running_var, *, eps, r_max, d_max, mask=None):
    """r and d of a batch."""
    rows = batch_norm.positions(x, mask)
    sigma = np.sqrt(((rows - rows.mean(axis=0)) ** 2).mean(axis=0) + eps)
    running_sigma = np.sqrt(np.asarray(running_var, dtype=np.float64) + eps)
    r = np.clip(sigma / running_sigma, 1 / r_max, r_max)
    d = np.clip((rows.mean(axis=0) - running_mean) / running_sigma, -d_max, d_max)
    return r, d


def forward(x, gamma, beta, r, d, *, eps, **options):
    """y = activation(gamma * (x_hat * r + d) + beta + residual)."""
    return batch_norm.forward(x, gamma * r, beta + gamma * d, eps=eps, **options)[0]


def backward(dy, x, gamma, beta, r, d, *, eps, **options):
    """dx, dgamma, dbeta, dresidual."""
    dx, dscale, dshift, dresidual = batch_norm.backward(dy, x, gamma * r, beta + gamma * d, eps=eps, **options)
    return dx, dscale * r + dshift * d, dshift, dresidual
