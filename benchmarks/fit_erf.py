"""Fits the polynomials of the kernels' erf (csrc/kernels/activation.h) and measures its error in float32 roundings.

    python -m benchmarks.fit_erf

Below 0.95, erf(x) = x + x p(x^2); above, erf(x) = 1 - exp(-x q(x)). Least squares at Chebyshev nodes, weighted so that
it is the error of erf that is small, and reweighted towards the largest error.
"""

from __future__ import annotations

import math

import numpy as np

SPLIT, END = 0.95, 3.95


def nodes(low: float, high: float, count: int) -> np.ndarray:
    """Chebyshev nodes of an interval."""
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(count) + 0.5) / count)


def fit(powers: np.ndarray, target: np.ndarray, weight: np.ndarray, rounds: int) -> np.ndarray:
    """Weighted least squares, the weights growing where the error is large."""
    growing = np.ones_like(weight)
    for _ in range(rounds):
        scale = weight * growing
        found, *_ = np.linalg.lstsq(powers * scale[:, None], target * scale, rcond=None)
        growing *= (1e-12 + np.abs((powers @ found - target) * weight)) ** 0.2
        growing /= growing.max()
    return found.astype(np.float32)


def fused(a: np.ndarray, b: np.ndarray, c: np.float32) -> np.ndarray:
    """a b + c, rounded once, as the processor's fused multiply-add."""
    return (a.astype(np.float64) * b.astype(np.float64) + np.float64(c)).astype(np.float32)


def evaluate(x: np.ndarray, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """The kernel's erf of float32 values >= 0."""
    square, p = x * x, np.full_like(x, small[-1])
    for c in small[-2::-1]:
        p = fused(p, square, c)
    capped, q = np.minimum(x, np.float32(END)), np.full_like(x, large[-1])
    for c in large[-2::-1]:
        q = fused(q, capped, c)
    rest = np.exp(-(q * capped).astype(np.float64)).astype(np.float32)
    return np.where(x < SPLIT, fused(p, x, np.float32(0)) + x, np.float32(1) - rest)


def main() -> None:
    x = nodes(1e-6, SPLIT, 400)
    erf = np.array([math.erf(v) for v in x])
    small = fit(np.vander(x * x, 7, increasing=True), erf / x - 1, x / erf, 1)
    x = nodes(SPLIT, END, 600)
    erfc = np.array([math.erfc(v) for v in x])
    large = fit(np.vander(x, 10, increasing=True), -np.log(erfc) / x, erfc * x, 60)
    print("p, from the constant up:", *(f"{c:.9g}" for c in small))
    print("q, from the constant up:", *(f"{c:.9g}" for c in large))
    x = np.concatenate([np.linspace(0, 5, 400001), 10.0 ** np.linspace(-10, 0, 10000)]).astype(np.float32)
    exact = np.array([math.erf(float(v)) for v in x])
    rounding = np.spacing(np.maximum(exact, 1e-30).astype(np.float32))
    print(f"largest error: {np.max(np.abs(evaluate(x, small, large) - exact) / rounding):.2f} roundings")


if __name__ == "__main__":
    main()
