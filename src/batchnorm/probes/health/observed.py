"""A batch norm as a survey finds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.nn.recognition import Layer
from batchnorm.probes.health.measured import Parting, Population, Units
from batchnorm.probes.health.seen import Padding


class Observed:
    """A batch norm as the batches found it.

    Attributes:
        names, module: as of :class:`~batchnorm.nn.recognition.Layer`.
        learns: whether it normalizes by its batch when the model trains; otherwise it is frozen.
        fresh: whether its running statistics are those that it was made with.
        place: its place in the order of the forward pass.
        evaluated: its inputs with every layer in eval mode.
        trained: its inputs with the batch norms before it in batch mode.
        units: its outputs in eval mode.
        parting: how far its outputs in the two modes are apart.
        padding: padded positions among its inputs.
        masked: whether it was told which values are real.
        positioned: whether its input has the positions that a batch's own mask or lengths tell of.
    """

    def __init__(self, layer: Layer, place: int, channels: int, device: torch.device, learns: bool) -> None:
        self.names, self.module, self.place, self.learns = layer.names, layer.module, place, learns
        self.fresh = _fresh(layer.module)
        self.evaluated = Population(channels, device, samples=True)
        self.trained = Population(channels, device, samples=False)
        self.units = Units(channels, device)
        self.parting = Parting()
        self.padding = Padding()
        self.masked = self.positioned = False

    @property
    def name(self) -> str:
        """The first path."""
        return self.names[0]


def _fresh(module: nn.Module) -> bool:
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return False
    return bool((mean == 0).all()) and bool((var == 1).all())
