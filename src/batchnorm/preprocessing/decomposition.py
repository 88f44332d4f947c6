"""From a covariance to whitening matrices: the five forms of Kessy, Lewin and Strimmer.

For a covariance ``S`` with the deviations ``V^(1/2)``, the correlation ``P`` and the eigenvalue decompositions
``S = U L U^T`` and ``P = G T G^T``, a whitening matrix ``W`` has ``W S W^T = I``:

    pca        L^(-1/2) U^T
    zca        U L^(-1/2) U^T
    cholesky   C^T                      where C C^T = S^(-1), C lower triangular
    pca-cor    T^(-1/2) G^T V^(-1/2)
    zca-cor    G T^(-1/2) G^T V^(-1/2)

(A. Kessy, A. Lewin, K. Strimmer, "Optimal whitening and decorrelation", The American Statistician 72, 2018.)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.moments import Scatter
from batchnorm.preprocessing.base import is_constant
from batchnorm.preprocessing.shrinkage import FourthMoments, ledoit_wolf_intensity, shrink

METHODS = ("pca", "zca", "cholesky", "pca-cor", "zca-cor")

# Entries of an eigenvector this close to its largest count as equally large when its sign is chosen: in exact ties
# (two correlated features) rounding would decide otherwise, and two fits would differ.
_SIGN_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Whitening:
    """Matrices of one solution, float64.

    ``whitening`` (outputs, features) and ``dewhitening`` (features, outputs), its inverse on the directions kept.
    ``components`` (k, features): the eigenvectors kept, as rows, by falling variance; ``variance`` and ``ratio`` (k,):
    the data's variance along each and its share of the total. Empty (0, ...) for Cholesky, which has none. ``rank``:
    the number of directions with variance. ``intensity``: of the shrinkage.
    """

    whitening: Tensor
    dewhitening: Tensor
    components: Tensor
    variance: Tensor
    ratio: Tensor
    rank: int
    intensity: float


def default_tolerance(num_features: int) -> float:
    """``10 p eps``: ten times the backward error of a symmetric eigenvalue solver for p features, in float64."""
    return 10 * num_features * torch.finfo(torch.float64).eps


def fix_signs(vectors: Tensor) -> Tensor:
    """Turn each column so that the first of its entries of largest magnitude is positive."""
    magnitude = vectors.abs()
    largest = magnitude >= (1 - _SIGN_TIE) * magnitude.amax(dim=0)
    first = largest.to(torch.int8).argmax(dim=0)
    leading = vectors.gather(0, first.unsqueeze(0))
    return torch.where(leading < 0, -vectors, vectors)


def solve(
    stats: Scatter | FourthMoments,
    *,
    method: str,
    n_components: int | float | None,
    shrinkage: str | float | None,
    eps: float,
    tolerance: float | None,
) -> Whitening:
    """The whitening that ``Whitener``'s parameters ask for, from what was learned.

    Raises InputError where no sample was complete, or no direction has variance for a pca form; warns where
    ``n_components`` is more than the rank.
    """
    scatter = stats.base if isinstance(stats, FourthMoments) else stats
    if float(scatter.count) == 0:
        raise InputError("whitening needs samples without NaN: every sample has a NaN in some feature")
    constant = is_constant(scatter.moments())
    varies = (~constant).to(torch.float64)
    scale = torch.where(constant, 1.0, scatter.std()) if method.endswith("-cor") else torch.ones_like(scatter.mean)
    # The rounding errors of a constant feature must not pass for a direction of its own.
    matrix = scatter.cov() * torch.outer(varies / scale, varies / scale)
    intensity = 0.0 if shrinkage is None or isinstance(shrinkage, str) else shrinkage
    if isinstance(stats, FourthMoments):
        intensity = ledoit_wolf_intensity(stats, matrix, scale)
    if tolerance is None:
        tolerance = default_tolerance(scatter.num_features)
    if method == "cholesky":
        outputs = None if n_components is None else int(n_components)
        return cholesky_whitening(matrix, intensity=intensity, eps=eps, tolerance=tolerance, outputs=outputs)
    solution = eigen_whitening(
        matrix,
        scale,
        rotate_back=method.startswith("zca"),
        intensity=intensity,
        eps=eps,
        tolerance=tolerance,
        n_components=n_components,
    )
    if method.startswith("pca") and solution.rank == 0:
        raise InputError(
            f"method={method!r} needs at least one direction with variance, got n_samples = {float(scatter.count):g} "
            "with none: pass samples that differ, or use method='zca'"
        )
    if isinstance(n_components, int) and solution.rank < n_components:
        warnings.warn(
            f"n_components={n_components}, but only {solution.rank} directions have variance: kept those",
            UserWarning,
            stacklevel=6,
        )
    return solution


def eigen_whitening(
    matrix: Tensor,
    scale: Tensor,
    *,
    rotate_back: bool,
    intensity: float,
    eps: float,
    tolerance: float,
    n_components: int | float | None,
) -> Whitening:
    """Whitening by eigenvalues: of the covariance (``scale`` 1), or of the correlation (``scale`` the deviations).

    A direction whose variance, shrunk by ``intensity``, is at most ``tolerance`` times the largest is without variance:
    its factor is 0, never ``1 / sqrt(almost 0)``. ``rotate_back`` makes ZCA of PCA.
    """
    variance, vectors = torch.linalg.eigh(matrix)
    variance, vectors = variance.flip(0).clamp_min(0), fix_signs(vectors.flip(1))
    total = variance.sum()
    ratio = variance / total if total > 0 else variance
    # Shrinking moves the eigenvalues and leaves the eigenvectors as they are.
    used = (1 - intensity) * variance + intensity * variance.mean()
    rank = int((used > tolerance * used[0]).sum()) if used[0] > 0 else 0
    kept = rank
    if isinstance(n_components, float):
        # The rounding of the sum must not ask for one more direction.
        kept = min(rank, 1 + int((ratio.cumsum(0) < n_components * (1 - 1e-12)).sum()))
    elif n_components is not None:
        kept = min(rank, n_components)
    components, deviation = vectors[:, :kept].T, (used[:kept] + eps).sqrt()
    whitening = components / deviation.unsqueeze(1) / scale
    dewhitening = (components * deviation.unsqueeze(1)).T * scale.unsqueeze(1)
    if rotate_back:
        whitening, dewhitening = components.T @ whitening, dewhitening @ components
    return Whitening(whitening, dewhitening, components, variance[:kept], ratio[:kept], rank, intensity)


def cholesky_whitening(
    covariance: Tensor, *, intensity: float, eps: float, tolerance: float, outputs: int | None
) -> Whitening:
    """Whitening by ``C^T``, ``C C^T = S^(-1)``: upper triangular, the last feature is only scaled.

    A feature of whose variance no more than the share ``tolerance`` is left after the features behind it have been
    taken out depends on them: its row and its column are 0. ``outputs``: how many rows to keep, from the last.
    """
    matrix = shrink(covariance, intensity)
    matrix = matrix + eps * torch.eye(matrix.shape[0]).to(matrix)
    # S = (R A A^T R) with R reversing the order: A lower triangular gives the upper factor whose inverse is C^T.
    lower, independent = _semidefinite_cholesky(matrix.flip(0, 1), tolerance)
    upper, kept = lower.flip(0, 1), independent.flip(0)
    core = upper[kept][:, kept]
    inverse = torch.linalg.solve_triangular(core, torch.eye(core.shape[0]).to(core), upper=True)
    whitening = torch.zeros_like(matrix)
    whitening[kept.nonzero(), kept.nonzero().T] = inverse
    first = 0 if outputs is None else matrix.shape[0] - outputs
    whitening, upper = whitening[first:], upper[:, first:]
    empty = matrix.new_empty(0)
    return Whitening(whitening, upper, matrix.new_empty((0, matrix.shape[0])), empty, empty, int(kept.sum()), intensity)


def _semidefinite_cholesky(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The lower factor, with zero columns for dependent features, and which are independent."""
    diagonal = matrix.diagonal()
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0 and bool((lower.diagonal().square() > tolerance * diagonal).all()):
        return lower, torch.ones_like(diagonal, dtype=torch.bool)
    lower = torch.zeros_like(matrix)
    independent = torch.zeros_like(diagonal, dtype=torch.bool)
    for j in range(matrix.shape[0]):
        column = matrix[j:, j] - lower[j:, :j] @ lower[j, :j]
        if column[0] > tolerance * diagonal[j]:
            lower[j:, j] = column / column[0].sqrt()
            independent[j] = True
    return lower, independent
