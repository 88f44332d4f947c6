"""Folders of images, through Pillow: batches (n, C, H, W) of those that follow each other with one size."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources.columns import Choice
from batchnorm.preprocessing.sources.files import FileSource, need, reading
from batchnorm.preprocessing.sources.source import Part, rows_of

# Modes whose pixels are numbers of a colour; the others (palettes, CMYK, ...) are brought to one of these.
_MODES = ("L", "LA", "RGB", "RGBA", "I", "I;16", "F")


class ImageSource(FileSource):
    """Images as (n, C, H, W), in the dtype of their pixels. An animation counts with its first frame.

    All must have the mode of the first (RGB, L, ...), or ``columns`` names the mode that all are converted to.
    """

    kind = "an image"

    def __init__(self, label: str, files: list[str], choice: Choice) -> None:
        super().__init__(label, files, choice)
        self.mode = None if choice.columns is None else choice.columns[0]
        if self.mode is not None and (self.mode not in _MODES or len(choice.columns or ()) > 1):
            raise InputError(f"columns of images is the mode to convert them to, one of {', '.join(_MODES)}")
        if choice.weights is not None:
            raise InputError(f"{label}: images have no column {choice.weights!r} with weights: pass sample_weight")
        self.rows = len(files)

    def parts(self) -> Iterator[Part]:
        """Images that follow each other with one size, in one part as far as they fit."""
        image_module = need("PIL.Image")
        held: list[NDArray[Any]] = []
        mode, first, start = self.mode, self.files[0], 0
        for number, (file, found, pixels) in enumerate(self._decoded(image_module)):
            mode = mode or found
            if found != mode:
                raise InputError(
                    f"{file}: the mode of this image is {found}, that of {first} is {mode}: "
                    'convert all to one with columns="RGB"'
                )
            if held and (pixels.shape != held[0].shape or len(held) >= self._limit(held[0])):
                yield self._part(held, start)
                held, start = [], number
            held.append(pixels)
        if held:
            yield self._part(held, start)

    def _limit(self, pixels: NDArray[Any]) -> int:
        return rows_of((1, *pixels.shape), pixels.itemsize, self.choice.batch_rows)

    def _part(self, held: list[NDArray[Any]], start: int) -> Part:
        stacked = np.stack(held)
        stacked = stacked[:, None] if stacked.ndim == 3 else np.moveaxis(stacked, -1, 1)
        label = self.files[start] if len(held) == 1 else f"{self.files[start]} and {len(held) - 1} more"
        return Part(stacked, file=label, row=0)

    def _decoded(self, image_module: Any) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Every file's mode and pixels, in order; Pillow decodes without holding Python, so threads share the work."""
        workers = min(8, os.cpu_count() or 1)
        waiting: deque[Any] = deque()
        with ThreadPoolExecutor(workers, thread_name_prefix="batchnorm-images") as pool:
            try:
                for file in self.files:
                    waiting.append(pool.submit(self._decode, image_module, file))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _decode(self, image_module: Any, file: str) -> tuple[str, str, NDArray[Any]]:
        with reading(file, self.kind):
            try:
                with image_module.open(file) as image:
                    image = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
                    mode = self.mode or _plain_mode(image.mode)
                    image = image if image.mode == mode else image.convert(mode)
                    pixels = np.asarray(image)
            except image_module.UnidentifiedImageError as error:
                raise ValueError("no image format that Pillow knows") from error
            except image_module.DecompressionBombError as error:
                raise ValueError(str(error)) from error
        return file, mode, pixels


def _plain_mode(mode: str) -> str:
    if mode.startswith("I;16"):
        return "I;16" if mode == "I;16" else "I"
    return mode if mode in _MODES else "L" if mode == "1" else "RGB"
