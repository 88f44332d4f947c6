"""Inverse square roots of covariance matrices, W = (S + eps I)^(-1/2), and their derivatives.

Two ways: through the eigenvalues (:class:`Eigen`) and by Newton's iteration (:class:`Newton`). Each comes in two forms:

- ``solve`` and ``pull``: the matrix, and the closed-form gradient from what ``solve`` kept. For eager training.
- ``differentiable``: plain torch functions, through which reverse and forward mode, vmap and the compiler find their
way,
  to the order that is stated.

Neither differentiates an eigenvalue decomposition, whose eigenvectors have no derivative where eigenvalues coincide
(pytorch #47599, #76531): W has one there, and it is what these formulas compute.

Matrices come as (g, G, G), symmetric and positive semidefinite up to rounding, float64 (float32 on devices without). A
matrix with a value that is not finite gives NaN, and harms no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Eigen:
    """W = U f(lambda) U^T with f = (lambda + eps)^(-1/2): ZCA whitening by eigenvalues.

    A direction whose eigenvalue is at most ``tolerance`` times the group's largest has no variance: f is 0 there, so
    that it is dropped and never amplified.

    With divided differences ``f[i, j] = (f_i - f_j) / (lambda_i - lambda_j)`` the derivative in the direction E is
    ``U (f[i, j] * U^T E U) U^T`` (Daleckii & Krein 1965). Written without the difference of eigenvalues, for
    ``a = (lambda + eps)^(1/2)``::

        f[i, j] = -1 / (a_i a_j (a_i + a_j))    both kept
        f[i, j] = f_i / lambda_i                only i kept: a dropped direction counts as variance 0
        f[i, j] = 0                             both dropped

    which is finite everywhere, at equal eigenvalues too.
    """

    eps: float
    tolerance: float

    def matrix(self, cov: Tensor) -> Tensor:
        """W alone, outside the gradient."""
        _, vectors, _, factor = self._decompose(cov.detach())
        return (vectors * factor.unsqueeze(-2)) @ vectors.mT

    def solve(self, cov: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """W, and what :meth:`pull` needs."""
        # Looking for the one bad value once saves a small tensor most of its time.
        decomposed = self._eigen(cov) if math.isfinite(cov.sum()) else self._decompose(cov)
        _, vectors, _, factor = decomposed
        return torch.bmm(vectors * factor.unsqueeze(-2), vectors.mT), decomposed

    def pull(self, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        """The gradient of S, symmetric, for a gradient of W."""
        values, vectors, kept, factor = saved
        inner = torch.bmm(torch.bmm(vectors.mT, _symmetric(grad)), vectors) * self._slopes(values, kept, factor)
        return torch.bmm(torch.bmm(vectors, inner), vectors.mT)

    def differentiable(self, cov: Tensor, orders: int = 3) -> Tensor:
        """W with its first ``orders`` derivatives.

        The decomposition is of the values alone. From there Newton's iteration, with the derivative held at its start,
        solves for the matrix itself: the start is the solution, so that nothing moves, but each step makes one more
        derivative of the result exact.

        Two equations, in the basis of the eigenvectors, for T = U^T S U: the dropped subspace turns by Z, such that
        (I - Z) T (I + Z) has no block between what is dropped and what is kept; and W (T + eps I) W = P, the projector
        on what is kept.
        """
        values, vectors, kept, factor = self._decompose(cov.detach())
        finite = factor.isfinite().all(-1, keepdim=True).unsqueeze(-1)
        eye = torch.eye(cov.size(-1), dtype=cov.dtype, device=cov.device)
        t = vectors.mT @ _symmetric(torch.where(finite, cov, eye)) @ vectors
        # To a kept direction (column) from a dropped one (row); the variance of a dropped one counts as 0.
        gap = torch.where(kept.unsqueeze(-2) & ~kept.unsqueeze(-1), values.unsqueeze(-2), math.inf).reciprocal()
        turn = gap * t
        for _ in range(orders - 1):
            turn = turn + gap * ((eye - turn) @ t @ (eye + turn))
        basis = torch.diag_embed(kept.to(t.dtype)) + turn
        projector = basis @ (eye - turn.mT @ turn) @ basis.mT
        root = torch.where(kept, (values + self.eps).sqrt(), 0)
        both = root.unsqueeze(-1) + root.unsqueeze(-2)
        step = torch.where(both > 0, both, math.inf).reciprocal()
        w = torch.diag_embed(torch.where(kept, factor, 0))
        shifted = t + self.eps * eye
        for _ in range(orders):
            w = w + step * (projector - w @ shifted @ w)
        w = vectors @ (projector @ w @ projector) @ vectors.mT
        return torch.where(finite, w, math.nan)

    def _decompose(self, cov: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`_eigen` where a value may be no number: LAPACK refuses it, and with it every other group."""
        finite = cov.isfinite().all(-1).all(-1)
        eye = torch.eye(cov.size(-1), dtype=cov.dtype, device=cov.device)
        values, vectors, kept, factor = self._eigen(torch.where(finite[..., None, None], cov, eye))
        return values, vectors, kept, torch.where(finite.unsqueeze(-1), factor, math.nan)

    def _eigen(self, cov: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues, eigenvectors as columns, which of them are kept, and f."""
        if cov.size(-1) == 1:  # needs no decomposition, of which exporters know none
            values, vectors = cov.squeeze(-1), torch.ones_like(cov)
        else:
            values, vectors = torch.linalg.eigh(cov)
        kept = values > self.tolerance * values[..., -1:]
        return values, vectors, kept, torch.where(kept, (values + self.eps).rsqrt(), 0)

    def _slopes(self, values: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        f_i, f_j = factor.unsqueeze(-1), factor.unsqueeze(-2)
        # 1 / (a_i a_j (a_i + a_j)) = f_i^2 f_j^2 / (f_i + f_j)
        both = (f_i * f_j).square().div_(f_i + f_j).neg_()
        if bool(kept.all()):
            return both
        fall = torch.where(kept, factor / torch.where(kept, values, 1), 0)
        one = kept.unsqueeze(-1) ^ kept.unsqueeze(-2)
        none = ~(kept.unsqueeze(-1) | kept.unsqueeze(-2))
        return torch.where(one, fall.unsqueeze(-1) + fall.unsqueeze(-2), both.masked_fill(none, 0))


@dataclass(frozen=True)
class Newton:
    """W by ``iterations`` of Newton's method on the trace-normalized matrix: Huang et al. (2019), equations 4 to 6.

    ``S_N = (S + eps I) / tr(S + eps I)``, ``P_0 = I``, ``P_k+1 = (3 P_k - P_k^3 S_N) / 2``, ``W = P_T / tr^(1/2)``.

    As the paper writes it, the iteration multiplies its rounding errors faster than it converges: in float64 too the
    result is lost before the 20th for a condition of 100. Carried along as ``M_k = P_k S_N P_k`` it is stable: with
    ``T_k = (3 I - M_k) / 2``, ``P_k+1 = P_k T_k`` and ``M_k+1 = T_k M_k T_k``.

    Eigenvalues of S_N lie in (0, 1], where the iteration converges: from below, by a factor of at most 3/2 an iteration
    while ``lambda_N`` is small, quadratically once near. So no direction is multiplied by more than ``1.5^T /
    tr^(1/2)``, and one whose share of the trace is less than ``1.5^(-2T)`` (1/58 for T = 5) stays below unit variance.
    That is the tolerance of this method: directions without variance are left small.
    """

    eps: float
    iterations: int

    def matrix(self, cov: Tensor) -> Tensor:
        """W alone, outside the gradient."""
        return self.differentiable(cov.detach())

    def solve(self, cov: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """W, and what :meth:`pull` needs: P_T, and of each iteration but the last P, T, M and M T."""
        trace, m = self._normalize(cov)
        normal, eye = m, _identity(cov)
        p, kept = eye, []
        for k in range(self.iterations):
            t = 1.5 * eye - 0.5 * m
            last, mt = k == self.iterations - 1, m
            if not last:
                mt = torch.bmm(m, t)
            kept += [p, t, mt]
            p = torch.bmm(p, t) if k else t
            if not last:
                m = torch.bmm(t, mt)
        return p * trace.rsqrt(), (trace, normal, p, *kept)

    def pull(self, saved: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        """The gradient of S, symmetric, for a gradient of W: back through the iterations."""
        trace, normal, result, *kept = saved
        root = trace.rsqrt()
        dp = _symmetric(grad)
        # d tr^(-1/2) = -1/2 tr^(-3/2) d tr
        dtrace = -0.5 * root * _inner(dp, result) / trace
        dp = dp * root
        dm: Tensor | None = None
        for k in range(self.iterations - 1, -1, -1):
            p, t, mt = kept[3 * k : 3 * k + 3]
            # All matrices are functions of S and commute, so that only the symmetric part of a gradient counts.
            dt = torch.bmm(p, dp) if k else dp
            if dm is not None:
                dt = torch.baddbmm(dt, mt, dm, alpha=2)
                dm = torch.bmm(torch.bmm(t, dm), t)
            dm = _symmetric(-0.5 * dt if dm is None else dm - 0.5 * dt)
            if k:
                dp = _symmetric(torch.bmm(dp, t))
        if dm is None:  # no iterations
            return dtrace * _identity(grad)
        dtrace = dtrace - _inner(dm, normal) / trace
        return dm / trace + dtrace * _identity(grad)

    def differentiable(self, cov: Tensor) -> Tensor:
        """W with all its derivatives: the iteration is a polynomial."""
        trace, m = self._normalize(cov)
        p = eye = _identity(cov)
        for _ in range(self.iterations):
            t = 1.5 * eye - 0.5 * m
            p, m = p @ t, t @ m @ t
        return _symmetric(p) * trace.rsqrt()

    def _normalize(self, cov: Tensor) -> tuple[Tensor, Tensor]:
        """The trace as (g, 1, 1), and S_N."""
        shifted = cov + self.eps * torch.eye(cov.size(-1), dtype=cov.dtype, device=cov.device)
        # Rounding may bring the trace of a covariance without variance below 0, whose root would be NaN.
        tiny = torch.finfo(cov.dtype).tiny ** 0.5
        trace = shifted.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=tiny)
        return trace, shifted / trace


Root = Eigen | Newton


def tolerance(group_size: int, dtype: torch.dtype) -> float:
    """4 G^(1/2) eps of ``dtype``: what rounding a matrix to it may add to an eigenvalue, relative to the largest."""
    return 4 * math.sqrt(group_size) * torch.finfo(dtype).eps


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.size(-1), dtype=like.dtype, device=like.device).expand(like.shape)
