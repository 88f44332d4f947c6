"""Subtract the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.preprocessing.base import Array, samples_seen
from batchnorm.preprocessing.elementwise import Affine, ElementwiseNormalizer
from batchnorm.preprocessing.inputs import Batch


class MomentsNormalizer(ElementwiseNormalizer):
    """Base of the estimators that learn each feature's moments."""

    _stats: Moments
    n_samples_seen_: int | float | Array

    def _statistics(self, batch: Batch, weights: Tensor | None) -> Moments:
        stats = batch.moments(weights).to("cpu")
        self._refuse_unusable(batch, stats.mean, stats.m2)
        return stats

    def _publish(self) -> None:
        self.n_samples_seen_ = samples_seen(self._stats.count)

    def _seen(self) -> Tensor:
        return self._stats.count > 0

    def _mean(self) -> Tensor:
        """The mean, NaN where no value was seen."""
        return torch.where(self._stats.count > 0, self._stats.mean, torch.nan)

    def _centre_and_spread(self) -> tuple[Tensor, Tensor]:
        return self._mean(), self._stats.std()

    def _read_state(self, tensors: dict[str, Tensor]) -> None:
        self._stats = Moments.from_dict(tensors)
        self._publish()


class MeanSubtractor(MomentsNormalizer):
    """Centre each feature: ``y = x - mean``.

    Parameters: ``copy=False`` writes into the data where their memory allows; ``channel_axis=1`` takes data of shape
    (N, C, *) and one mean per channel, None data of shape (N, features).

    Attributes: ``mean_`` (features,) float64, ``n_samples_seen_``, ``n_features_in_``, ``feature_names_in_``.

    A feature that is NaN throughout has the mean NaN (``fit`` gives a RuntimeWarning); for the rest see the methods.
    """

    mean_: Array

    def __init__(self, *, copy: bool = True, channel_axis: int | None = None) -> None:
        self.copy = copy
        self.channel_axis = channel_axis

    def _publish(self) -> None:
        super()._publish()
        self.mean_ = self._mean().numpy()

    def _affine(self) -> Affine:
        return Affine(self._mean(), self._stats.mean_low, torch.ones_like(self._stats.mean))
