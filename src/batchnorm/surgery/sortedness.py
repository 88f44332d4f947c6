"""Whether batches are sorted by class: what they are predicted to be tells one batch from another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LIMIT = 0.1
"""Above this share, batches count as sorted by class; docs/test-time-adaptation.md has what is lost at which share."""


class SortedBatchesWarning(UserWarning):
    """Batches are sorted by class, which destroys an adaptation of batch statistics."""


class Sortedness:
    r"""How much a batch tells about the classes predicted in it, over the batches seen so far.

    .. math::
        \mathrm{share} = \frac{H - \sum_b \frac{n_b}{n} H_b - \frac{(K - 1)(B - 1)}{2 n}}{H}

    with H the entropy of all n predictions and :math:`H_b` that of batch b's: the mutual information of batch and class
    as a share of the entropy, less what B batches of independent samples of K classes have in expectation. About 0 for
    shuffled batches of any size; 1 where each batch is of one class and the classes are all there.
    """

    def __init__(self) -> None:
        self.pooled: Tensor | None = None
        self.batches = 0
        self._within = 0.0  # sum of n_b H_b

    def add(self, classes: Tensor, number: int) -> None:
        """A batch: its predicted classes (n,), of ``number`` classes."""
        counts = torch.bincount(classes.detach().flatten().cpu(), minlength=number).double()
        if self.pooled is not None and len(self.pooled) != len(counts):
            self.pooled = None
        if self.pooled is None:
            self.pooled, self.batches, self._within = torch.zeros_like(counts), 0, 0.0
        self.pooled = self.pooled + counts
        self.batches += 1
        self._within += float(counts.sum()) * _entropy(counts)

    @property
    def samples(self) -> int:
        """n, of all batches."""
        return 0 if self.pooled is None else int(self.pooled.sum())

    @property
    def share(self) -> float:
        """The share, 0 where nothing can be said: fewer than two batches, or one class in all of them."""
        if self.pooled is None or self.batches < 2 or (total := _entropy(self.pooled)) == 0:
            return 0.0
        return max(0.0, total - self._within / self.samples - self._freedom / (2 * self.samples)) / total

    @property
    def _freedom(self) -> int:
        """(K - 1)(B - 1): of independent samples, 2 n times the mutual information is about chi-squared with it."""
        assert self.pooled is not None
        return (int((self.pooled > 0).sum()) - 1) * (self.batches - 1)

    @property
    def is_sorted(self) -> bool:
        """Whether the share is above :data:`LIMIT`, and not by chance (less than 1 in 8000 for each batch)."""
        share = self.share
        if share <= LIMIT or self.pooled is None:
            return False
        # Of chi-squared, P(x - d >= 2 sqrt(d t) + 2 t) <= exp(-t): Laurent & Massart (2000), lemma 1. Here t is 9.
        return share * _entropy(self.pooled) * 2 * self.samples > 6 * math.sqrt(self._freedom) + 18

    def __str__(self) -> str:
        return (
            f"batches are sorted by class: of {self.batches} with {self.samples / max(self.batches, 1):.0f} samples, "
            f"which one a sample is in says {self.share:.0%} of its predicted class (shuffled: 0%, limit: {LIMIT:.0%})"
        )


def _entropy(counts: Tensor) -> float:
    """In nats."""
    shares = counts[counts > 0] / counts.sum()
    return max(0.0, -math.fsum((shares * shares.log()).tolist()))
