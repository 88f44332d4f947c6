"""Variances and directions: what every solver finds, and the exact ones.

The covariance ``S = X^T X / N`` (p x p) of centred samples ``X`` (n x p) and their Gram matrix ``X X^T / N`` (n x n)
have the same eigenvalues but for zeros, and ``u = X^T v / sqrt(N l)`` turns an eigenvector ``v`` of the one into that
of the other: whichever is smaller is solved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh as scipy_eigh
from threadpoolctl import threadpool_limits
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.preprocessing.secondmoments import Rows

# Entries of an eigenvector this close to its largest count as equally large when its sign is chosen: in exact ties
# (two correlated features) rounding would decide otherwise, and two fits would differ.
_SIGN_TIE = 1e-6
# Up to this width torch's divide and conquer is the faster solver, and its three further matrices are small. LAPACK's
# syevr takes half as long again, one further matrix, and for k eigenvectors only k columns of it.
_SMALL = 3072
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True, eq=False)
class Spectrum:
    """``variance`` (r,), falling, not negative; ``components`` (k, features), k <= r, as rows, signs fixed."""

    variance: Tensor
    components: Tensor


def fix_signs(vectors: Tensor) -> Tensor:
    """Turn each column so that the first of its entries of largest magnitude is positive."""
    return vectors * leading_signs(vectors.T)


def leading_signs(rows: Tensor) -> Tensor:
    """1 or -1 for each row: the sign of the first of its entries of largest magnitude, (r,)."""
    signs = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
    step = max(1, _BLOCK_ELEMENTS // (4 * max(1, rows.shape[1])))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        magnitude = block.abs()
        largest = magnitude >= (1 - _SIGN_TIE) * magnitude.amax(dim=1, keepdim=True)
        first = largest.to(torch.int8).argmax(dim=1, keepdim=True)
        signs[start : start + step] = torch.where(block.gather(1, first).squeeze(1) < 0, -1.0, 1.0)
    return signs


def spectrum_of(matrix: Tensor, wanted: int | None = None) -> Spectrum:
    """The spectrum of a covariance (p, p), which is consumed; of the components only the first ``wanted``.

    Beside ``matrix`` it takes the memory of the eigenvectors, or for p up to 3072 of three more.
    """
    # The smallest eigenvalues of -S come first: they are the largest of S, in the order wanted.
    negative = matrix.neg_()
    if matrix.shape[0] <= _SMALL:
        values, vectors = torch.linalg.eigh(negative)
        components = vectors.T[:wanted].contiguous()
    else:
        last = matrix.shape[0] if wanted is None else wanted
        with threadpool_limits(torch.get_num_threads(), user_api="blas"):
            # LAPACK reads columns: the transpose of a symmetric matrix is itself, without a copy.
            found = scipy_eigh(
                negative.numpy().T, overwrite_a=True, check_finite=False, driver="evr", subset_by_index=[0, last - 1]
            )
        values, components = torch.from_numpy(found[0]), torch.from_numpy(np.ascontiguousarray(found[1].T))
    return Spectrum(values.neg().clamp_min_(0), components.mul_(leading_signs(components).unsqueeze(1)))


def deviations(rows: tuple[Rows, ...], moments: Moments, factor: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``sqrt(w_i / N) (x_i - mean) factor`` (n, c), the samples standing in columns ``c``, a block of them at a time.

    The sum of the products of its rows is the covariance of the data times ``factor``.
    """
    share = torch.cat([(r.weights.cpu() / moments.count[0]).sqrt() for r in rows]).unsqueeze(1)
    step = max(64, _BLOCK_ELEMENTS // share.shape[0])
    for start in range(0, moments.num_features, step):
        block = slice(start, min(start + step, moments.num_features))
        part = torch.cat([r.values[:, block].to("cpu", torch.float64) for r in rows])
        yield block, part.sub_(moments.mean[block]).sub_(moments.mean_low[block]).mul_(factor[block]).mul_(share)


def gram_matrix(rows: tuple[Rows, ...], moments: Moments, factor: Tensor) -> Tensor:
    """The products between samples, (n, n), of ``deviations``."""
    count = sum(r.values.shape[0] for r in rows)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for _, block in deviations(rows, moments, factor):
        gram.addmm_(block, block.T)
    return gram


def spectrum_of_gram(
    gram: Tensor, rows: tuple[Rows, ...], moments: Moments, factor: Tensor, wanted: int | None
) -> Spectrum:
    """The covariance's spectrum, as far as there is variance, from the Gram matrix, which is consumed.

    Of the components only the first ``wanted``.
    Directions whose variance is rounding errors of the largest are left out: nothing orthogonal could be made of them.
    """
    samples = spectrum_of(gram)
    variance = samples.variance
    found = int((variance > 10 * gram.shape[0] * torch.finfo(torch.float64).eps * variance[:1]).sum())
    variance, kept = variance[:found], found if wanted is None else min(found, wanted)
    weights = samples.components[:kept] / variance[:kept].sqrt().unsqueeze(1)
    components = torch.empty(kept, moments.num_features, dtype=torch.float64)
    overlap = torch.zeros(kept, kept, dtype=torch.float64)
    for block, columns in deviations(rows, moments, factor):
        part = weights @ columns
        components[:, block] = part
        overlap.addmm_(part, part.T)
    # The directions of small variance carry the rounding errors of the large: what they share with those before them
    # is taken out, as by Gram and Schmidt.
    lower = torch.linalg.cholesky(overlap)
    for start in range(0, moments.num_features, 4096):
        part = components[:, start : start + 4096]
        part.copy_(torch.linalg.solve_triangular(lower, part, upper=False))
    return Spectrum(variance, components.mul_(leading_signs(components).unsqueeze(1)))
