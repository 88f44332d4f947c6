"""Batch normalization in float64 NumPy, written from the paper. Imports nothing of the package.

Source: Ioffe & Szegedy (2015), Algorithm 1 and the gradients of section 3, in the paper's order and with its
intermediate quantities, however slow.
"""

from __future__ import annotations

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def positions(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The real positions of x (N, C, *spatial) as rows: (m, C)."""
    rows = np.moveaxis(np.asarray(x, dtype=np.float64), 1, -1).reshape(-1, x.shape[1])
    return rows if mask is None else rows[np.asarray(mask).reshape(-1)]


def restore(rows: np.ndarray, like: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The inverse of :func:`positions`, zero where nothing real stands."""
    moved = np.moveaxis(like, 1, -1)
    full = np.zeros((moved.size // like.shape[1], like.shape[1]))
    full[slice(None) if mask is None else np.asarray(mask).reshape(-1)] = rows
    return np.moveaxis(full.reshape(moved.shape), -1, 1)


def activate(z: np.ndarray, name: str) -> np.ndarray:
    match name:
        case "none":
            return z
        case "relu":
            return np.maximum(z, 0)
        case "leaky_relu":
            return np.where(z > 0, z, 0.01 * z)
        case "silu":
            return z / (1 + np.exp(-z))
        case "gelu":
            return z * 0.5 * (1 + erf(z / np.sqrt(2)))
        case "hardswish":
            return z * np.clip(z + 3, 0, 6) / 6
    raise ValueError(name)


def slope(z: np.ndarray, name: str) -> np.ndarray:
    """The derivative of the activation as a central difference: independent of any formula for it."""
    if name in ("none", "relu", "leaky_relu"):
        return {"none": np.ones_like(z), "relu": (z > 0) * 1.0, "leaky_relu": np.where(z > 0, 1.0, 0.01)}[name]
    h = 1e-6
    return (activate(z + h, name) - activate(z - h, name)) / (2 * h)


def forward(x, gamma, beta, *, eps, residual=None, mask=None, activation="none"):
    """y, mean, var (biased) of Algorithm 1."""
    rows = positions(x, mask)
    mean = rows.mean(axis=0)
    var = ((rows - mean) ** 2).mean(axis=0)
    x_hat = (rows - mean) / np.sqrt(var + eps)
    z = gamma * x_hat + beta
    if residual is not None:
        z = z + positions(residual, mask)
    return restore(activate(z, activation), x, mask), mean, var


def backward(dy, x, gamma, beta, *, eps, residual=None, mask=None, activation="none"):
    """dx, dgamma, dbeta, dresidual: the paper's chain rule, one intermediate gradient after the other."""
    rows = positions(x, mask)
    m = len(rows)
    mean = rows.mean(axis=0)
    var = ((rows - mean) ** 2).mean(axis=0)
    x_hat = (rows - mean) / np.sqrt(var + eps)
    z = gamma * x_hat + beta + (0 if residual is None else positions(residual, mask))
    dz = positions(dy, mask) * slope(z, activation)
    dx_hat = dz * gamma
    dvar = (dx_hat * (rows - mean) * -0.5 * (var + eps) ** -1.5).sum(axis=0)
    dmean = (-dx_hat / np.sqrt(var + eps)).sum(axis=0) + dvar * (-2 * (rows - mean)).sum(axis=0) / m
    dx = dx_hat / np.sqrt(var + eps) + dvar * 2 * (rows - mean) / m + dmean / m
    dgamma = (dz * x_hat).sum(axis=0)
    dbeta = dz.sum(axis=0)
    return restore(dx, x, mask), dgamma, dbeta, restore(dz, x, mask)
