"""Whitening over a batch in float64 NumPy, written from the papers. Imports nothing of the package.

Source: Huang et al. (2018), "Decorrelated Batch Normalization"; Huang et al. (2019), "Iterative Normalization".
"""

from __future__ import annotations

import numpy as np

from oracles.batch_norm import positions, restore


def statistics(rows: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (C,) and biased covariance (g, G, G)."""
    mean = rows.mean(axis=0)
    groups = np.split(rows - mean, rows.shape[1] // group_size, axis=1)
    return mean, np.stack([group.T @ group / len(rows) for group in groups])


def zca(cov: np.ndarray, eps: float, tolerance: float = 0.0) -> np.ndarray:
    """U (L + eps)^(-1/2) U^T over the directions with variance."""
    values, vectors = np.linalg.eigh(cov)
    kept = values > tolerance * values[-1]
    vectors, values = vectors[:, kept], values[kept]
    return vectors @ np.diag((values + eps) ** -0.5) @ vectors.T


def newton(cov: np.ndarray, eps: float, iterations: int) -> np.ndarray:
    """By eigenvalues: p_k+1 = (3 p_k - p_k^3 s) / 2 for each share s of the trace."""
    values, vectors = np.linalg.eigh(cov + eps * np.eye(len(cov)))
    trace = values.sum()
    p = np.ones_like(values)
    for _ in range(iterations):
        p = (3 * p - p**3 * values / trace) / 2
    return vectors @ np.diag(p / np.sqrt(trace)) @ vectors.T


def apply(x, mean, matrices, gamma, beta, mask=None):
    """gamma W (x - mean) + beta, zero where nothing real stands."""
    rows = positions(x, mask)
    groups = np.split(rows - mean, len(matrices), axis=1)
    white = np.concatenate([group @ w.T for group, w in zip(groups, matrices, strict=True)], axis=1)
    return restore(gamma * white + beta, x, mask)


def forward(x, group_size, root, gamma, beta, mask=None):
    """y of a training batch; ``root`` makes W of a covariance."""
    mean, cov = statistics(positions(x, mask), group_size)
    return apply(x, mean, [root(each) for each in cov], gamma, beta, mask)


def gradient(x, dy, group_size, root, gamma, beta, mask=None, step=1e-5):
    """The derivative of sum(dy * y) in a random direction is all that central differences give cheaply: a function."""

    def along(direction: np.ndarray) -> float:
        h = step * direction
        up, down = (forward(x + s * h, group_size, root, gamma, beta, mask) for s in (1, -1))
        return float((dy * (up - down)).sum() / (2 * step))

    return along
