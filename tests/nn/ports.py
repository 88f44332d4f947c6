"""Between other frameworks' data, channels last, and a layer of ours."""

from __future__ import annotations

import numpy as np
import torch

import batchnorm as bn


def to_ours(x: np.ndarray | list) -> torch.Tensor:
    """Channels last to channels first."""
    return torch.tensor(np.asarray(x, dtype=np.float32)).movedim(-1, 1)


def from_ours(y: torch.Tensor) -> np.ndarray:
    return y.detach().movedim(1, -1).numpy()


def layer_of(conversion: bn.nn.state.LayerState, kind=bn.nn.BatchNorm1d) -> torch.nn.Module:
    layer = kind(3, **conversion.options)
    layer.load_state_dict(conversion.state)
    return layer
