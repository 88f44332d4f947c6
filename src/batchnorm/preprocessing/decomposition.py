"""From what was learned to whitening matrices: the five forms of Kessy, Lewin and Strimmer.

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

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

from batchnorm._checks import check_choice, check_not_negative
from batchnorm._errors import InputError
from batchnorm.moments import Moments
from batchnorm.preprocessing.base import is_constant
from batchnorm.preprocessing.factors import EigenWhitening, MatrixWhitening, Whitening
from batchnorm.preprocessing.randomized import Sketch
from batchnorm.preprocessing.secondmoments import SecondMoments
from batchnorm.preprocessing.shrinkage import (
    FourthMoments,
    checked_shrinkage,
    ledoit_wolf_intensity,
    ledoit_wolf_of_gram,
    shrink,
)
from batchnorm.preprocessing.spectrum import Spectrum, gram_matrix, spectrum_of, spectrum_of_gram

METHODS = ("pca", "zca", "cholesky", "pca-cor", "zca-cor")
SOLVERS = ("auto", "eigh", "gram", "randomized")


@dataclass(frozen=True)
class Wish:
    """What ``Whitener``'s parameters ask for, see there; ``tolerance`` None is the default one."""

    method: str = "pca"
    n_components: int | float | None = None
    shrinkage: str | float | None = None
    eps: float = 0.0
    tolerance: float | None = None
    solver: str = "auto"

    @classmethod
    def of(cls, estimator: Any) -> Self:
        """The parameters of a Whitener. Raises InputError where one makes no sense, or not with another."""
        method, solver, wanted = estimator.method, estimator.solver, estimator.n_components
        check_choice("method", method, METHODS)
        check_choice("solver", solver, SOLVERS)
        whole = isinstance(wanted, Integral) and not isinstance(wanted, bool) and int(wanted) >= 1
        share = isinstance(wanted, Real) and not isinstance(wanted, Integral) and 0 < float(wanted) <= 1
        if wanted is not None and not (whole or share):
            raise InputError(
                f"n_components must be an integer from 1, a share of the variance in (0, 1] or None, got {wanted!r}"
            )
        if share and method == "cholesky":
            raise InputError(f'method="cholesky" has no shares of variance: n_components must be whole, got {wanted!r}')
        shrinkage = checked_shrinkage(estimator.shrinkage)
        check_not_negative("eps", estimator.eps)
        check_not_negative("tol", 0 if estimator.tol is None else estimator.tol)
        if method == "cholesky" and solver in ("gram", "randomized"):
            raise InputError(f'method="cholesky" is not made of eigenvectors: use solver="eigh", got {solver!r}')
        if solver == "randomized" and not whole:
            raise InputError(f'solver="randomized" needs a whole n_components, got {wanted!r}')
        if solver == "randomized" and isinstance(shrinkage, str):
            raise InputError('solver="randomized" has no Ledoit-Wolf: make shrinkage a number, or use solver="auto"')
        return cls(
            method=method,
            n_components=int(wanted) if whole else None if wanted is None else float(wanted),
            shrinkage=shrinkage,
            eps=float(estimator.eps),
            tolerance=None if estimator.tol is None else float(estimator.tol),
            solver=solver,
        )

    @property
    def shrinks(self) -> bool:
        """Whether directions without variance are to be given some."""
        return isinstance(self.shrinkage, str) or bool(self.shrinkage)


def default_tolerance(num_features: int) -> float:
    """``10 p eps``: ten times the backward error of a symmetric eigenvalue solver for p features, in float64."""
    return 10 * num_features * torch.finfo(torch.float64).eps


def standardization(moments: Moments, method: str) -> tuple[Tensor, Tensor]:
    """``scale`` (C,), the deviations in the -cor forms and else 1, and ``factor``, 1 / scale but 0 if constant.

    The rounding errors of a constant feature must not pass for a direction of its own.
    """
    constant = is_constant(moments)
    scale = torch.where(constant, 1.0, moments.std()) if method.endswith("-cor") else torch.ones_like(moments.mean)
    return scale, torch.where(constant, 0.0, scale.reciprocal())


def solve(stats: SecondMoments | Sketch, wish: Wish) -> Whitening:
    """The whitening that is asked for, from what was learned.

    Raises InputError where no sample was complete, no direction has variance for a pca form, or the solver cannot give
    what is asked; warns where ``n_components`` is more than the rank.
    """
    moments = stats.moments
    if float(stats.count) == 0:
        raise InputError("whitening needs samples without NaN: every sample has a NaN in some feature")
    tolerance = default_tolerance(moments.num_features) if wish.tolerance is None else wish.tolerance
    scale, factor = standardization(moments, wish.method)
    total = float((moments.var() * factor.square()).sum())
    intensity = 0.0 if wish.shrinkage is None or isinstance(wish.shrinkage, str) else wish.shrinkage
    rest = False  # whether directions beyond the spectrum are known to have no variance
    if isinstance(stats, Sketch):
        spectrum = stats.spectrum
        if spectrum is None:
            raise InputError('solver="randomized" has learned from other parameters: fit again')
    elif _by_samples(stats, wish):
        gram = gram_matrix(stats.rows, moments, factor)
        if stats.fourth:
            intensity = ledoit_wolf_of_gram(gram, torch.cat([r.weights.cpu() for r in stats.rows]), stats.num_features)
        wanted = wish.n_components if isinstance(wish.n_components, int) else None
        spectrum, rest = spectrum_of_gram(gram, stats.rows, moments, factor, wanted), True
    else:
        matrix, intensity = _matrix(stats, factor, scale, intensity)
        if wish.method == "cholesky":
            outputs = None if wish.n_components is None else int(wish.n_components)
            return cholesky_whitening(matrix, intensity=intensity, eps=wish.eps, tolerance=tolerance, outputs=outputs)
        spectrum = spectrum_of(matrix, wish.n_components if isinstance(wish.n_components, int) else None)
    solution = _whiten(spectrum, scale, wish, total, intensity, tolerance, rest)
    if wish.method.startswith("pca") and solution.rank == 0:
        raise InputError(
            f"method={wish.method!r} needs at least one direction with variance, got n_samples = "
            f"{float(stats.count):g} with none: pass samples that differ, or use method='zca'"
        )
    if isinstance(wish.n_components, int) and solution.rank < wish.n_components:
        warnings.warn(
            f"n_components={wish.n_components}, but only {solution.rank} directions have variance: kept those",
            UserWarning,
            stacklevel=6,
        )
    return solution


def _matrix(stats: SecondMoments, factor: Tensor, scale: Tensor, intensity: float) -> tuple[Tensor, float]:
    """The covariance of the data times ``factor``, and how far to shrink it."""
    whole = stats.whole()
    scatter = whole.base if isinstance(whole, FourthMoments) else whole
    root = factor / scatter.count.sqrt()
    matrix = scatter.scatter * root
    matrix.mul_(root.unsqueeze(1))
    if isinstance(whole, FourthMoments):
        intensity = ledoit_wolf_intensity(whole, matrix, scale)
    return matrix, intensity


def _by_samples(stats: SecondMoments, wish: Wish) -> bool:
    """Whether the Gram matrix of the samples gives everything that is asked for."""
    if stats.products is not None:
        reason = "the samples themselves, which were not kept: fit again"
    elif wish.method == "cholesky":
        reason = "eigenvectors, and method='cholesky' has none: use solver='eigh'"
    elif wish.shrinks and wish.n_components is None and wish.method.startswith("pca"):
        reason = "n_components where shrinkage gives every direction variance: pass n_components, or use solver='eigh'"
    elif wish.shrinks and isinstance(wish.n_components, int) and wish.n_components >= stats.num_rows:
        reason = f"n_components below the number of samples, {stats.num_rows}: ask for fewer, or use solver='eigh'"
    else:
        return wish.solver in ("auto", "gram")
    if wish.solver == "gram":
        raise InputError(f"solver='gram' needs {reason}")
    return False


def _whiten(
    spectrum: Spectrum, scale: Tensor, wish: Wish, total: float, intensity: float, tolerance: float, rest: bool
) -> EigenWhitening:
    """The whitening by eigenvalues: of the covariance (``scale`` 1), or of the correlation (``scale`` the deviations).

    A direction whose variance, shrunk by ``intensity``, is at most ``tolerance`` times the largest is without variance:
    its factor is 0, never ``1 / sqrt(almost 0)``. ``total``: the sum of all variances.
    """
    variance, p = spectrum.variance, scale.shape[0]
    ratio = variance / total if total > 0 else variance
    # Shrinking moves the eigenvalues and leaves the eigenvectors as they are.
    given = intensity * total / p
    used = (1 - intensity) * variance + given
    largest = float(used[0]) if len(used) else given
    rank = int((used > tolerance * largest).sum()) if largest > 0 else 0
    kept, others = rank, 0.0
    if rest and given > tolerance * largest:
        rank += p - len(variance)
        others = math.sqrt(given + wish.eps) if wish.n_components is None else 0.0
    if isinstance(wish.n_components, float):
        # The rounding of the sum must not ask for one more direction.
        kept = min(kept, 1 + int((ratio.cumsum(0) < wish.n_components * (1 - 1e-12)).sum()))
    elif wish.n_components is not None:
        kept = min(kept, wish.n_components)
    return EigenWhitening(
        # A view would hold on to the rest.
        components=spectrum.components if kept == len(spectrum.components) else spectrum.components[:kept].clone(),
        variance=variance[:kept],
        ratio=ratio[:kept],
        deviation=(used[:kept] + wish.eps).sqrt(),
        scale=scale,
        others=others,
        rotate_back=wish.method.startswith("zca"),
        rank=rank,
        intensity=intensity,
    )


def cholesky_whitening(
    covariance: Tensor, *, intensity: float, eps: float, tolerance: float, outputs: int | None
) -> MatrixWhitening:
    """Whitening by ``C^T``, ``C C^T = S^(-1)``: upper triangular, the last feature is only scaled; ``S`` is consumed.

    A feature of whose variance no more than the share ``tolerance`` is left after the features behind it have been
    taken out depends on them: its row and its column are 0. ``outputs``: how many rows to keep, from the last.
    """
    matrix = shrink(covariance, intensity)
    matrix.diagonal().add_(eps)
    # S = (R A A^T R) with R reversing the order: A lower triangular gives the upper factor whose inverse is C^T.
    lower, independent = _semidefinite_cholesky(matrix.flip(0, 1), tolerance)
    upper, kept = lower.flip(0, 1), independent.flip(0)
    del lower
    whitening = torch.zeros_like(upper)
    if bool(kept.all()):
        torch.linalg.solve_triangular(upper, whitening.fill_diagonal_(1), upper=True, out=whitening)
    else:
        core = upper[kept][:, kept]
        inverse = torch.linalg.solve_triangular(core, torch.eye(core.shape[0]).to(core), upper=True)
        whitening[kept.nonzero(), kept.nonzero().T] = inverse
    first = 0 if outputs is None else upper.shape[0] - outputs
    whitening, upper = whitening[first:], upper[:, first:]
    empty = upper.new_empty(0)
    components = upper.new_empty((0, upper.shape[0]))
    return MatrixWhitening(whitening, upper, components, empty, empty, int(kept.sum()), intensity)


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
