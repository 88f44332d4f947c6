"""A batch norm of another class with the very same tensors."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from batchnorm.nn.batch_norm import _BatchNormLayer

Kind = TypeVar("Kind", bound=nn.modules.batchnorm._BatchNorm)

SETTINGS = ("eps", "momentum", "affine", "track_running_stats")
"""What every batch norm was made with."""

POLICIES = ("activation", "ddof", "on_single_value", "inference_weight")
"""What a layer of this package was made with besides."""


def twin(kind: type[Kind], layer: nn.modules.batchnorm._BatchNorm, **options: Any) -> Kind:
    """A ``kind`` with the settings of ``layer``, its mode, and its parameters and buffers, which are then both's.

    Policies (:data:`POLICIES`) go along where both are layers of this package. Hooks, children and whatever a user put
    on the layer do not.

    Args:
        kind: a class whose constructor takes those of torch's layers.
        layer: a batch norm, torch's or ours.
        options: for the constructor, before what ``layer`` says.
    """
    names = (*SETTINGS, *POLICIES) if issubclass(kind, _BatchNormLayer) else SETTINGS
    settings = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    # On the meta device: its own tensors are not needed.
    made = kind(layer.num_features, device="meta", **{**settings, **options})
    made._parameters = dict(layer._parameters)
    made._buffers = dict(layer._buffers)
    made._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
    made.training = layer.training
    return made
