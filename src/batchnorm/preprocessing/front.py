"""What puts a fitted estimator in front of a network: a module of its own, or a part of the network's first layer."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from batchnorm.preprocessing.folding import LinearMap, fold


class FrontOfNetwork:
    """Base of the estimators. A subclass gives the module and, where its transform is linear, the map."""

    channel_axis: int | None

    def to_module(self, dtype: torch.dtype = torch.float32, *, inverse: bool = False) -> nn.Module:
        """``transform`` as an ``nn.Module`` in front of a network: differentiable, exportable, its numbers in buffers.

        ``inverse``: ``inverse_transform`` instead, which brings the outputs of a network that learned scaled targets
        back to the targets' units. The result has the input's dtype, integer input (image bytes) gives ``dtype``.

        The mean is stored in a high and a low part, so that data far from zero lose no precision in float32. For data
        in float64 pass ``dtype=torch.float64``: ``.double()`` afterwards computes in float64, but with what float32
        buffers kept. Raises InputError where a statistic is outside the range of ``dtype``.
        """
        raise NotImplementedError

    def fold_into(self, layer: Any, *, tolerance: float | None = None) -> Any:
        """A new layer that does to raw data what ``layer`` does to transformed data: ``W' = W A``, no module in front.

        ``layer``: ``nn.Linear`` (the estimator with ``channel_axis=None`` or -1), ``nn.Conv1d/2d/3d`` or
        ``nn.ConvTranspose1d/2d/3d`` (with ``channel_axis=1``); it stays as it is. The new one has its class, dtype and
        device, the algebra is float64 and rounded once; a bias is added where the shift needs one. A NaN, which
        ``to_module`` confines to its feature, spreads over the outputs of a layer either way.

        Where the transform moves zero, zero padding of a convolution and the borders of a transposed one cannot be
        folded (padding_mode "reflect", "replicate" and "circular" can). In float32 the shift cancels against data far
        from zero: the new layer is compared with ``layer`` behind the transform in float64, on data drawn like those
        of ``fit``, and refused where an output is off by more than ``tolerance`` times its largest value (None: the
        square root of the dtype's epsilon, 3.5e-4 in float32).

        Raises InputError (clipping, such padding, groups behind a Whitener, a lost accuracy, a parametrized layer,
        hooks, features without a value), ShapeError for another width, DtypeError for another kind of layer.
        """
        check_is_fitted(self)
        return fold(type(self).__name__, self._linear_map(), self.channel_axis, layer, tolerance)

    def _linear_map(self) -> LinearMap:
        """The transform as a linear map, for folding; raise InputError where it is none."""
        raise NotImplementedError
