"""The k leading directions from a few passes over the data, without a matrix of features x features.

Subspace iteration from a random start (N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness",
SIAM Review 53, 2011, algorithm 4.4) on the covariance ``S``, of which each pass gives the product with the l = k + 10
columns of ``Q``: ``Y = S Q``. The last one is used by their Nystroem method (section 5.5), ``S ~ Y (Q^T Y)^+ Y^T``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.moments import Moments
from batchnorm.preprocessing.secondmoments import complete_rows
from batchnorm.preprocessing.spectrum import Spectrum, leading_signs

OVERSAMPLING = 10
# scikit-learn's rule for the same trade: few directions are worth more passes.
_PASSES, _PASSES_MANY = 8, 5
# No pass more once every variance wanted has moved by less than this share of itself, or by rounding errors.
_SETTLED = 1e-11

Visit = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is learned by ``solver="randomized"``: moments of each feature, and the leading directions.

    ``rows``: how many samples were complete. ``visit``: passes each block of those samples and their weights to a
    function; None once there is a ``spectrum``.
    """

    moments: Moments
    rows: int
    spectrum: Spectrum | None = None
    visit: Callable[[Visit], None] | None = None

    @classmethod
    def from_batch(cls, x: Tensor, *, channel_axis: int, weights: Tensor | None) -> Sketch:
        """Of the channel vectors of ``x`` that hold no NaN; ``x`` is read again by ``visit``."""
        found: list[Any] = [Moments.empty(x.shape[channel_axis], x.device), 0]

        def count(rows: Tensor, row_weights: Tensor) -> None:
            found[0] = found[0].merge(Moments.from_batch(rows, weights=row_weights))
            found[1] += rows.shape[0]

        def visit(function: Visit) -> None:
            visit_rows(x, channel_axis, weights, function)

        visit(count)
        return cls(found[0].to("cpu"), found[1], visit=visit)

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self.moments.num_features

    @property
    def count(self) -> Tensor:
        """The number of samples, or the sum of their weights, ()."""
        return self.moments.count[0]

    def merge(self, other: Sketch) -> Sketch:
        """The moments of both; the directions are still to be found."""
        return Sketch(self.moments.merge(other.moments), self.rows + other.rows)

    def solved(self, factor: Tensor, wanted: int, seed: int) -> Sketch:
        """With the ``wanted`` leading directions of the data times ``factor`` (features,), and without the data."""
        if self.visit is None or self.spectrum is not None or float(self.count) == 0:
            return replace(self, visit=None)
        columns = min(wanted + OVERSAMPLING, self.num_features, self.rows)
        passes = _PASSES if wanted < 0.1 * min(self.rows, self.num_features) else _PASSES_MANY
        start = torch.randn(
            self.num_features, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        spectrum = subspace_iteration(lambda q: self._times(q, factor), start, wanted, passes)
        return replace(self, spectrum=spectrum, visit=None)

    def _times(self, columns: Tensor, factor: Tensor) -> Tensor:
        """The covariance of the data times ``factor``, times ``columns`` (features, l): one pass."""
        scaled, total = columns * factor.unsqueeze(1), torch.zeros_like(columns)
        mean, low = self.moments.mean, self.moments.mean_low

        def add(rows: Tensor, weights: Tensor) -> None:
            deviation = (rows.to("cpu", torch.float64) - mean).sub_(low)
            along = (deviation @ scaled).mul_((weights.cpu() / self.count).unsqueeze(1))
            total.addmm_(deviation.T, along)

        if self.visit is not None:
            self.visit(add)
        return total.mul_(factor.unsqueeze(1))

    def to_dict(self) -> dict[str, Tensor]:
        """The moments as plain tensors by name."""
        moments = {f"moments.{name}": tensor for name, tensor in self.moments.to_dict().items()}
        return {**moments, "randomized": torch.tensor(float(self.rows), dtype=torch.float64)}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor]) -> Sketch:
        """Read what :meth:`to_dict` gave."""
        moments = {name.removeprefix("moments."): t for name, t in tensors.items() if name != "randomized"}
        return cls(Moments.from_dict(moments), int(tensors["randomized"]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "visit": None}


def visit_rows(x: Tensor, channel_axis: int, weights: Tensor | None, function: Visit) -> None:
    """Pass the complete samples of ``x`` and their weights to ``function``, block by block."""
    for rows, row_weights in complete_rows(x, channel_axis, weights):
        function(rows, row_weights)


def subspace_iteration(times: Callable[[Tensor], Tensor], start: Tensor, wanted: int, passes: int) -> Spectrum:
    """The ``wanted`` largest eigenvalues and their vectors of a positive semidefinite matrix known by its products."""
    noise = start.shape[0] * torch.finfo(torch.float64).eps
    q, last = torch.linalg.qr(start).Q, None
    while True:
        y = times(q)
        inner = q.T @ y
        theta, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        leading = theta[-wanted:]
        passes -= 1
        bound = _SETTLED * leading.abs() + noise * leading[-1:]
        if passes == 0 or (last is not None and bool(((leading - last).abs() <= bound).all())):
            break
        q, last = torch.linalg.qr(y).Q, leading
    if not bool(torch.isfinite(theta).all()):
        raise InputError("Input X holds values too large: their squares overflow float64; rescale the data")
    known = theta > noise * theta[-1].clamp_min(0)
    if not bool(known.any()):
        return Spectrum(theta.new_empty(0), theta.new_empty((0, start.shape[0])))
    left, singular, _ = torch.linalg.svd((y @ vectors[:, known]) / theta[known].sqrt(), full_matrices=False)
    components = left.T[:wanted].contiguous()
    return Spectrum(singular[:wanted].square(), components.mul_(leading_signs(components).unsqueeze(1)))
