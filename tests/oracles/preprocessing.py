"""Textbook forms of the transforms, in float64 NumPy, along other ways than the package's."""

from __future__ import annotations

from typing import Any

import numpy as np


def standardize(x: Any) -> Any:
    x = np.asarray(x, dtype=np.float64)
    return (x - x.mean(0)) / x.std(0)


def min_max(x: Any, a: float, b: float) -> Any:
    x = np.asarray(x, dtype=np.float64)
    return a + (b - a) * (x - x.min(0)) / (x.max(0) - x.min(0))


def inverse_root(matrix: Any) -> Any:
    """``M^(-1/2)`` of a positive definite matrix, by Newton's iteration of Denman and Beavers: no eigenvalues."""
    y, z = np.asarray(matrix, dtype=np.float64), np.eye(len(matrix))
    for _ in range(60):
        y, z = (y + np.linalg.inv(z)) / 2, (z + np.linalg.inv(y)) / 2
    return z


def whitening_matrix(x: Any, method: str) -> Any:
    """``W`` of Kessy, Lewin and Strimmer 2018 from data of full rank; pca rows only up to their sign."""
    x = np.asarray(x, dtype=np.float64)
    n = len(x)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / n
    deviation = np.sqrt(np.diag(covariance))
    if method == "zca":
        return inverse_root(covariance)
    if method == "zca-cor":
        return inverse_root(covariance / np.outer(deviation, deviation)) / deviation
    if method == "cholesky":
        return np.linalg.cholesky(np.linalg.inv(covariance)).T
    # The principal directions from the data themselves: the covariance is never formed.
    standardized = centred / deviation if method == "pca-cor" else centred
    _, singular, directions = np.linalg.svd(standardized, full_matrices=False)
    w = directions * np.sqrt(n) / singular[:, None]
    return w / deviation if method == "pca-cor" else w


def ledoit_wolf(x: Any) -> float:
    """The shrinkage intensity as the 2004 paper writes it, sample by sample, lemma 3.4 and 3.5."""
    x = np.asarray(x, dtype=np.float64)
    n, p = x.shape
    centred = x - x.mean(0)
    s = centred.T @ centred / n

    def norm2(a: Any) -> float:
        return float((a * a).sum() / p)

    m = np.trace(s) / p
    d2 = norm2(s - m * np.eye(p))
    b2 = min(sum(norm2(np.outer(row, row) - s) for row in centred) / n**2, d2)
    return b2 / d2
