"""Which columns are features: choosing by name, and saying which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError


@dataclass(frozen=True)
class Choice:
    """What the caller asked for: ``columns`` (None for all), the column with the weights, the rows of a part."""

    columns: tuple[str, ...] | None = None
    weights: str | None = None
    batch_rows: int | None = None

    @classmethod
    def of(cls, columns: Sequence[str] | str | None, weights: str | None, batch_rows: int | None) -> Choice:
        """The arguments of ``open_source``, checked."""
        wanted = (columns,) if isinstance(columns, str) else None if columns is None else tuple(columns)
        if wanted is not None:
            if not wanted:
                raise InputError("columns is empty: name at least one column, or leave it out to take all")
            twice = next((name for name in wanted if wanted.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"columns names {twice!r} twice")
            if weights in wanted:
                raise InputError(f"column {weights!r} cannot be both a feature and the weights")
        if batch_rows is not None and (isinstance(batch_rows, bool) or int(batch_rows) != batch_rows or batch_rows < 1):
            raise InputError(f"batch_rows must be a positive integer, got {batch_rows!r}")
        return cls(wanted, weights, None if batch_rows is None else int(batch_rows))


def choose(there: Sequence[Any], choice: Choice, where: str, more: Sequence[str] = ()) -> list[Any]:
    """The names of the features, of those that are ``there``; ``more`` are taken only if they are asked for."""
    known = [*there, *more]
    for name in (*(choice.columns or ()), *(() if choice.weights is None else (choice.weights,))):
        if name not in known:
            raise InputError(f"{where}: no column {name!r}{near(name, known)}")
    if choice.columns is not None:
        return list(choice.columns)
    chosen = [name for name in there if name != choice.weights]
    if not chosen:
        raise InputError(f"{where}: no column is left as a feature")
    return chosen


def near(name: str, known: Sequence[Any]) -> str:
    """What may have been meant, to end a message with."""
    names = [str(other) for other in known]
    close = difflib.get_close_matches(str(name), names, n=3)
    if close:
        return f": did you mean {' or '.join(map(repr, close))}?"
    return f": there {'is' if len(names) == 1 else 'are'} {listed(names)}" if names else ""


def listed(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def weights_of(values: Any, name: str, where: str) -> NDArray[np.float64]:
    """The weights of a part as (n,) float64."""
    try:
        weights = np.asarray(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: column {name!r}, the weights, must be numbers") from error
    if weights.ndim != 1:
        raise InputError(f"{where}: {name!r}, the weights, must be one number a sample, got shape {weights.shape}")
    return weights
