"""A normalization that ends with drop and act, as timm's ``BatchNormAct2d``, of any class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Activated(nn.Module):
    """y = act(drop(norm(x))), where norm is the other base class: :func:`activated` puts the two together.

    The layer has the tensors, and so the keys of the ``state_dict``, of the other base, and what ``drop`` and ``act``
    have. It takes the place of a layer with a fused activation where the new class offers none, or not that one.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The other base class's forward, then drop, then act."""
        y: Tensor = self.act(self.drop(super().forward(input, *args, **kwargs)))
        return y

    def __reduce__(self) -> Any:
        """Rebuilt from the other base: the class itself has no place that pickle could find."""
        return _empty, (base_of(type(self)),), self.__getstate__()


_made: dict[type[nn.Module], type[nn.Module]] = {}


def activated(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with drop and act after it; a subclass of it, named as timm names its own: ``GroupNormAct``."""
    if kind not in _made:
        body = {"__module__": __name__, "__doc__": Activated.__doc__}
        _made[kind] = type(f"{kind.__name__}Act", (Activated, kind), body)
    return _made[kind]


def base_of(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that :func:`activated` was given; any other class is its own."""
    for found in kind.__mro__:
        if Activated in found.__bases__:
            return found.__bases__[1]
    return kind


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = activated(kind)
    return made.__new__(made)
