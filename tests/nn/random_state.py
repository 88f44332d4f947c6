"""A layer's state for a test."""

from __future__ import annotations

import torch


def randomise(layer: torch.nn.Module) -> torch.nn.Module:
    """Values that hide no error: the defaults 0 and 1 do."""
    with torch.no_grad():
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5))
    return layer
