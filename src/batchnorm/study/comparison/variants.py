"""The variants of a comparison: names of normalizations, and functions of a user's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm._errors import InputError
from batchnorm.study.comparison import norms

KINDS = ("none", "batch", "torch", "renorm", "ghost", "group", "layer", "instance", "iternorm", "decorrelated")
SIZED = ("ghost", "group", "iternorm", "decorrelated")
"""Those that take a number, as in ``ghost=16``: samples of a ghost, number of groups, channels of a group."""


@dataclass(frozen=True)
class Variant:
    """A normalization: called with a number of features it gives the layer.

    ``kind`` and ``size`` say which of the package's; ``maker`` is a user's own. ``batch`` is the size of a batch.
    """

    name: str
    kind: str = ""
    size: int | None = None
    maker: Callable[[int], nn.Module] | None = None
    batch: int = 64

    def __call__(self, num_features: int) -> nn.Module:
        """The layer for ``num_features`` channels.

        Raises:
            InputError: the user's own function gives no module.
        """
        if self.maker is None:
            return norms.make(self.kind, self.size, num_features, self.batch)
        made = self.maker(num_features)
        if not isinstance(made, nn.Module):
            raise InputError(f"expected variant {self.name!r} to give a torch.nn.Module, got {type(made).__name__}")
        return made


def read(variants: Any, batch: int) -> tuple[Variant, ...]:
    """What ``variants=`` means: names, callables (called by their ``__name__``), or a mapping of names to either.

    Raises:
        InputError: an unknown name, a name twice, or fewer than two.
    """
    if isinstance(variants, str):
        variants = [name.strip() for name in variants.split(",") if name.strip()]
    pairs: list[tuple[str, Any]] = []
    if isinstance(variants, Mapping):
        pairs = [(str(name), item) for name, item in variants.items()]
    elif isinstance(variants, Sequence):
        pairs = [(item if isinstance(item, str) else getattr(item, "__name__", str(item)), item) for item in variants]
    else:
        raise InputError(f"expected variants as names or functions, got {type(variants).__name__}")
    found = tuple(_one(name, item, batch) for name, item in pairs)
    names = [variant.name for variant in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"expected variants of different names, got {twice!r} twice: give a mapping of names")
    if len(found) < 2:
        raise InputError(f"expected two variants or more to compare, got {', '.join(names) or 'none'}")
    return found


def _one(name: str, item: Any, batch: int) -> Variant:
    if item is None:
        item = name
    if not isinstance(item, str):
        if not callable(item) or isinstance(item, nn.Module):
            raise InputError(f"expected variant {name!r} as a function of the number of features, got {item!r}")
        return Variant(name, maker=item, batch=batch)
    kind, given, size = item.partition("=")
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else f": expected some of {', '.join(KINDS)}"
        raise InputError(f"unknown variant {item!r}{hint}")
    if not given:
        return Variant(name, kind, batch=batch)
    if kind not in SIZED or not re.fullmatch(r"[1-9]\d*", size):
        raise InputError(f"expected a number after one of {', '.join(SIZED)}, as in ghost=16, got {item!r}")
    return Variant(name, kind, int(size), batch=batch)
