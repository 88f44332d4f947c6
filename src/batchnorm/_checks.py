"""One form of message for the checks that several rooms make: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real

from batchnorm._errors import InputError


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise an InputError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise InputError(f"expected {name} to be one of {options}, got {value!r}")


def check_not_negative(name: str, value: object) -> None:
    """Raise an InputError unless ``value`` is a finite number and not negative."""
    if not isinstance(value, Real) or not 0 <= float(value) < float("inf"):
        raise InputError(f"{name} must be a finite number and not negative, got {value!r}")
