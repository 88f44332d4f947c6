"""Changes of the digits' images, as another camera or another light makes them. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batchnorm.study.data import Floats

SIDE = 8
"""Digits are SIDE x SIDE images, given as rows of SIDE * SIDE pixels between 0 and 1."""


def brighter(x: Floats, by: float) -> Floats:
    """``x + by``; nothing is cut off at 1, so that no information is lost."""
    return x + by


def paler(x: Floats, factor: float) -> Floats:
    """``factor * x``: less contrast, and darker."""
    return factor * x


def noisy(x: Floats, deviation: float, seed: int) -> Floats:
    """``x + n`` with n from N(0, deviation^2), independent for each pixel."""
    return x + deviation * np.random.default_rng([seed, 11]).standard_normal(x.shape)


def blurred(x: Floats) -> Floats:
    """The mean of the 3 x 3 pixels around each; the border is repeated outwards."""
    padded = np.pad(x.reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.asarray(windows.mean((-2, -1)).reshape(x.shape), dtype=np.float64)


def moved(x: Floats) -> Floats:
    """One pixel to the right; what comes in is empty."""
    images = x.reshape(-1, SIDE, SIDE)
    result = np.zeros_like(images)
    result[:, :, 1:] = images[:, :, :-1]
    return result.reshape(x.shape)


def shifts(*, brightness: float, contrast: float, noise: float) -> dict[str, Callable[[Floats, int], Floats]]:
    """All changes by name, each a function of images ``(n, 64)`` and a seed; "clean" is none."""
    return {
        "clean": lambda x, _: x,
        "brightness": lambda x, _: brighter(x, brightness),
        "contrast": lambda x, _: paler(x, contrast),
        "noise": lambda x, seed: noisy(x, noise, seed),
        "blur": lambda x, _: blurred(x),
        "moved": lambda x, _: moved(x),
    }
