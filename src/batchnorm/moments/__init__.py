"""Counts, means and sums of squared deviations that merge exactly: the package's one definition of mean and variance.

:class:`Moments` holds them for each channel, :class:`Scatter` with all products between channels
(:class:`ScatterSum` while it grows). Both are computed in float64 from deviations (never ``E[x^2] - E[x]^2``), in one
pass over the memory by the operators ``batchnorm::moments`` (see ``operator``) and ``batchnorm::add_products`` (see
``products``), and combined by Chan's formulas

    n      = n_a + n_b
    delta  = mean_b - mean_a
    mean   = mean_a + delta n_b / n
    m2     = m2_a + m2_b + delta^2 n_a n_b / n

(T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979). The mean is kept as an unevaluated sum of two float64 numbers: with a single one, ``delta`` inherits the mean's
rounding, which at a mean of 1e8 and a deviation of 1 costs eight digits of the variance.
"""

from __future__ import annotations

from batchnorm.moments.blocks import as_tensor
from batchnorm.moments.scatter import Scatter, ScatterSum
from batchnorm.moments.statistics import Moments, bessel_factor, difference_of_means, pooled

__all__ = ["Moments", "Scatter", "ScatterSum", "as_tensor", "bessel_factor", "difference_of_means", "pooled"]
