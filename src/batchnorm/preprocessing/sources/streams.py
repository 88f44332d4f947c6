"""Sources in the process: iterables of batches, DataLoaders, datasets of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources.columns import Choice, choose, near, weights_of
from batchnorm.preprocessing.sources.source import PART_BYTES, Part, Source


class IterableSource(Source):
    """Batches from an iterable: arrays, tensors, frames; of a tuple or list the first entry counts, as in (x, y).

    Of a dictionary the entry ``columns`` names counts, of a frame its columns.
    """

    def __init__(self, batches: Iterable[Any], choice: Choice | None = None) -> None:
        self.batches = batches
        self.choice = choice or Choice()
        self.label = f"the {type(batches).__name__}"
        self.again = not isinstance(batches, Iterator)
        self.rows = _samples(batches)

    def parts(self) -> Iterator[Part]:
        """One part an item."""
        row = 0
        for number, item in enumerate(self.batches):
            values, weights = take(item, self.choice, f"batch {number} of {self.label}")
            if not hasattr(values, "__len__"):
                raise InputError(
                    f"batch {number} of {self.label} is a {type(values).__name__}: expected an array (n, features)"
                )
            part = Part(values, weights, row=row)
            row += part.rows
            yield part


def take(item: Any, choice: Choice, where: str) -> tuple[Any, Any]:
    """What of an item are the samples, and their weights."""
    if isinstance(item, dict):
        if choice.columns is None:
            raise InputError(f"{where} is a dict with {sorted(map(str, item))}: pass columns=KEY")
        if len(choice.columns) > 1:
            raise InputError(
                f"{where} is a dict: columns names the one entry that holds the data, got {choice.columns}"
            )
        for key in (*choice.columns, *(() if choice.weights is None else (choice.weights,))):
            if key not in item:
                raise InputError(f"{where} is a dict and has no {key!r}{near(key, list(item))}")
        weights = None if choice.weights is None else weights_of(item[choice.weights], choice.weights, where)
        return item[choice.columns[0]], weights
    if isinstance(item, (tuple, list)) and item and hasattr(item[0], "shape"):
        item = item[0]
    if choice.columns is None and choice.weights is None:
        return item, None
    if not hasattr(item, "columns"):
        raise InputError(f"{where} is a {type(item).__name__} without names to choose from: drop columns= and weights=")
    chosen = choose(list(item.columns), choice, where)
    weights = None if choice.weights is None else weights_of(item[choice.weights], choice.weights, where)
    return item[chosen], weights


def _samples(batches: Any) -> int | None:
    """How many samples a loader has, if it knows."""
    if not isinstance(batches, DataLoader) or batches.batch_size is None:
        return None
    try:
        count = len(batches.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return count - count % batches.batch_size if batches.drop_last else count


class DatasetSource(Source):
    """A torch Dataset, whose samples are stacked to batches; of a sample what of a batch counts in IterableSource."""

    def __init__(self, dataset: Dataset[Any], choice: Choice) -> None:
        self.dataset = dataset
        self.choice = choice
        self.label = f"the {type(dataset).__name__}"
        self.rows = None if isinstance(dataset, IterableDataset) else len(dataset)  # type: ignore[arg-type]

    def parts(self) -> Iterator[Part]:
        """Stacked samples."""
        row = 0
        held: list[torch.Tensor] = []
        weights: list[Any] = []
        limit = self.choice.batch_rows
        for number, item in enumerate(self._samples()):
            sample, weight = self._sample(item, f"sample {number} of {self.label}")
            held.append(sample)
            weights.append(weight)
            limit = limit or max(1, PART_BYTES // max(1, sample.numel() * sample.element_size()))
            if len(held) == limit:
                yield self._part(held, weights, row)
                row, held, weights = row + limit, [], []
        if held:
            yield self._part(held, weights, row)

    def _samples(self) -> Iterator[Any]:
        if isinstance(self.dataset, IterableDataset):
            yield from self.dataset
        else:
            for index in range(self.rows or 0):
                yield self.dataset[index]

    def _sample(self, item: Any, where: str) -> tuple[torch.Tensor, Any]:
        if isinstance(item, dict) and self.choice.weights is not None:
            item = {key: [value] if key == self.choice.weights else value for key, value in item.items()}
        sample, weight = take(item, self.choice, where)
        return torch.as_tensor(sample), weight

    def _part(self, held: list[torch.Tensor], weights: list[Any], row: int) -> Part:
        for number, sample in enumerate(held):
            if sample.shape != held[0].shape:
                raise InputError(
                    f"sample {row + number} of {self.label} has shape {tuple(sample.shape)}, "
                    f"expected {tuple(held[0].shape)} as the ones before"
                )
        joined = None if self.choice.weights is None else np.concatenate(weights)
        return Part(torch.stack(held), joined, row=row)
