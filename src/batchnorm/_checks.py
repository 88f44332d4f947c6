"""One form of message for the checks that several rooms make: what was expected, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Collection

from batchnorm._errors import InputError


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise an InputError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise InputError(f"expected {name} to be one of {options}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise an InputError unless ``value`` is a finite number above zero."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be positive, got {value!r}")


def plural(count: int, noun: str) -> str:
    """``1 column``, ``2 columns``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
