"""What is known of a watched layer before it runs: its kind, and its parameters at the beginning of a pass."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from batchnorm.nn.recognition import is_batch_norm, is_frozen
from batchnorm.probes.watching.layers import flat_ends, rectifies
from batchnorm.probes.watching.statistics import as_array

PARAMETERS = ("weight", "bias", "running_mean", "running_var")
Places = list[tuple[str, int, int]]
"""A layer's name, which of :data:`PARAMETERS`, how many numbers."""

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_FLOATING = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
_REAL = _FLOATING | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


_HOLDERS = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder)


class Kind:
    """A watched layer, and what its kind says."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.normalizes = is_batch_norm(module) or is_frozen(module)
        self.ends_in_zeros, self.flat_input = rectifies(module), flat_ends(module)
        # Torch's own modules and batch norms leave their input alone unless they say so; of others nothing is known.
        known = self.normalizes or type(module).__module__.startswith("torch.nn.modules.")
        self.overwrites = not known or isinstance(module, _HOLDERS) or bool(getattr(module, "inplace", False))
        self.has_eps = hasattr(module, "eps")
        self.follower: nn.Module | None = None
        self.followed = False  # whether a look has shown what follows

    @property
    def eps(self) -> float:
        """Of a normalization; else 0."""
        return float(getattr(self.module, "eps", 0.0) or 0.0)

    @property
    def ddof(self) -> int:
        """What the running variance is an average of: unbiased variances, unless a layer of ours says 0."""
        return int(getattr(self.module, "ddof", 1))

    def parameters(self) -> list[Tensor | None]:
        """:data:`PARAMETERS` of a normalization, as its dictionaries hold them; of others None.

        Not by attribute: a parametrization may compute, or move a state of its own, whenever it is asked.
        """
        if not self.has_eps:
            return [None] * len(PARAMETERS)
        parameters, buffers = self.module._parameters, self.module._buffers
        return [parameters.get(name, buffers.get(name)) for name in PARAMETERS]


class Parameters:
    """The parameters of all watched layers: one copy for each type and device, made in one call."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._kinds = list(kinds)
        self._found: list[Tensor | None] = []
        self._groups: list[tuple[list[Tensor], Places]] = []

    def copy(self) -> Copies:
        """What they are now."""
        found = [tensor for kind in self._kinds for tensor in kind.parameters()]
        # Training changes tensors in place: they are sorted anew only when a layer has others, or moved.
        if len(found) != len(self._found) or not all(map(operator.is_, found, self._found)) or self._moved():
            self._found, self._groups = found, self._sorted(found)
            if any(tensor is not None and not _is_plain(tensor) for tensor in found):
                self._found = []  # a lazy layer's may become plain
        with torch.no_grad():
            return Copies([(torch.cat(tensors), places) for tensors, places in self._groups])

    def _moved(self) -> bool:
        return any(
            tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device
            for tensors, _ in self._groups
            for tensor in tensors
        )

    def _sorted(self, found: list[Tensor | None]) -> list[tuple[list[Tensor], Places]]:
        groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], Places]] = {}
        for number, tensor in enumerate(found):
            if _is_plain(tensor) and tensor.dim() == 1:
                kind, place = divmod(number, len(PARAMETERS))
                tensors, places = groups.setdefault((tensor.dtype, tensor.device), ([], []))
                tensors.append(tensor)
                places.append((self._kinds[kind].name, place, len(tensor)))
        return list(groups.values())


class Copies:
    """Copies of the parameters of all layers."""

    def __init__(self, copies: list[tuple[Tensor, Places]]) -> None:
        self._copies = copies

    def read(self) -> dict[str, list[Any]]:
        """For each layer's name its four arrays, None for what is not there."""
        found: dict[str, list[Any]] = {}
        for copy, places in self._copies:
            values, start = as_array(copy), 0
            for name, place, size in places:
                found.setdefault(name, [None] * len(PARAMETERS))[place] = values[start : start + size]
                start += size
        return found


def unreadable(x: Tensor | None) -> str | None:
    """Why the values of ``x`` cannot be looked at, or None if they can."""
    if _is_plain(x) and x.dim():
        return None
    if x is None:
        return "its input holds no tensor"
    if isinstance(x, nn.UninitializedParameter | nn.UninitializedBuffer):
        return "its input is not made yet"
    if x.dim() == 0:
        return "its input is a single number"
    if x.is_nested and x.layout == torch.jagged:
        return None
    what = f"on {x.device}" if x.is_meta else f"{x.dtype}, {x.layout}"
    return f"its input is a {type(x).__name__} without plain values ({what})"


def _is_plain(x: Tensor | None) -> TypeGuard[Tensor]:
    # By type first: what a lazy layer has not made yet has no other properties.
    return type(x) in _PLAIN and x.dtype in _REAL and x.layout is torch.strided and not x.is_meta  # type: ignore[union-attr]
