"""Two linear layers and the mean squared error, in float64 NumPy: gradients by algebra."""

from __future__ import annotations

import numpy as np


class TwoLinearLayers:
    """z = x W1' + b1, p = z W2' + b2, L = mean over all entries of (p - y)^2. Weights are (out, in)."""

    def __init__(self, w1, b1, w2, b2, x, y):
        self.w1, self.b1, self.w2, self.b2, self.x, self.y = w1, b1, w2, b2, x, y

    def gradients(self, w1, b1):
        """dL/dW1, dL/db1, dL/dW2, dL/db2 with the first layer at (w1, b1)."""
        z = self.x @ w1.T + b1
        dp = 2.0 * (z @ self.w2.T + self.b2 - self.y) / self.y.size
        dz = dp @ self.w2
        return dz.T @ self.x, dz.sum(0), dp.T @ z, dp.sum(0)

    def gradient_norm(self):
        return np.sqrt(sum((part**2).sum() for part in self.gradients(self.w1, self.b1)))

    def shift_of_the_second(self, rate):
        """|G|, |G - G'| and their cosine, G' after a step of the first layer: Santurkar et al. 2018, definition 2.1."""
        dw1, db1, dw2, db2 = self.gradients(self.w1, self.b1)
        *_, dw2_after, db2_after = self.gradients(self.w1 - rate * dw1, self.b1 - rate * db1)
        here = np.concatenate([dw2.ravel(), db2])
        there = np.concatenate([dw2_after.ravel(), db2_after])
        norm = np.linalg.norm
        return norm(here), norm(here - there), here @ there / (norm(here) * norm(there))
