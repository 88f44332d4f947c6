"""Percentiles of the input of a layer's units, as in Figure 1 of Ioffe & Szegedy 2015."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from batchnorm._errors import InputError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor, nn

PERCENTILES = (15.0, 50.0, 85.0)
"""The levels of the paper's Figure 1, in per cent."""


@dataclass(frozen=True)
class Look:
    """One look at a layer's input: ``percentiles`` is units x levels, ``deviations`` (biased) one per unit."""

    percentiles: tuple[tuple[float, ...], ...]
    deviations: tuple[float, ...]


class InputPercentiles:
    """Looks at the input of ``module`` while the block lasts; the network computes exactly what it would without.

    >>> with InputPercentiles(model[-2]) as probe:               # doctest: +SKIP
    ...     model(x)                                             # (N, d)
    >>> probe.look.percentiles                                   # units x 3        # doctest: +SKIP

    Percentiles are interpolated linearly, over the N values that each unit took in the last forward pass.

    Raises:
        InputError: ``look`` is asked for before a forward pass, or a level is outside 0 to 100.
        ShapeError: the input of the module is not ``(N, units)`` with N > 0.
    """

    def __init__(self, module: nn.Module, levels: tuple[float, ...] = PERCENTILES) -> None:
        if not levels or not all(0.0 <= level <= 100.0 for level in levels):
            raise InputError(f"expected percentiles between 0 and 100, got {levels}")
        self._module = module
        self._levels = levels
        self._look: Look | None = None
        self._handle: Any = None

    def __enter__(self) -> InputPercentiles:
        self._handle = self._module.register_forward_pre_hook(self._see)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    @property
    def look(self) -> Look:
        """What the last forward pass showed."""
        if self._look is None:
            raise InputError("expected a forward pass before looking, got none: call the model inside the block")
        return self._look

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        import torch

        x = inputs[0].detach()
        if x.dim() != 2 or x.shape[0] == 0:
            raise ShapeError(f"expected input of shape (N, units) with N > 0, got {tuple(x.shape)}")
        x = x.double()  # the percentiles' differences are what counts later: no rounding of ours in them
        at = torch.tensor(self._levels, dtype=torch.float64, device=x.device) / 100.0
        percentiles = torch.quantile(x, at, dim=0).t()
        deviations = x.std(dim=0, correction=0)
        self._look = Look(tuple(tuple(row) for row in percentiles.tolist()), tuple(deviations.tolist()))
