"""The data of a comparison: three parts, and the same batches in the same order for every variant."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm._errors import InputError

TARGETS = ("labels", "label", "targets", "target", "y")
"""Keys under which a batch that is a mapping holds its targets."""
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Batch:
    """``inputs`` as the model takes them (a tensor, a tuple or a mapping) and ``target``."""

    inputs: Any
    target: Tensor
    raw: Any = None

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        move = lambda item: item.to(device, non_blocking=True)  # noqa: E731
        return Batch(*(pytree.tree_map_only(Tensor, move, part) for part in (self.inputs, self.target, self.raw)))

    def __len__(self) -> int:
        return int(self.target.shape[0]) if self.target.dim() else 1


def split_batch(raw: Any) -> Batch:
    """(inputs, target); (x, lengths, ..., target); or a mapping with its target under a known name.

    Raises:
        InputError: the batch is none of these.
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        name = next((key for key in TARGETS if key in raw), None)
        if name is None:
            raise InputError(f"expected a batch with one of {', '.join(TARGETS)}, got the keys {', '.join(raw)}")
        return Batch({key: value for key, value in raw.items() if key != name}, torch.as_tensor(raw[name]), raw)
    if not isinstance(raw, list | tuple) or len(raw) < 2:
        raise InputError(f"expected batches as (inputs, target), got a {type(raw).__name__} without a target")
    inputs = raw[0] if len(raw) == 2 else tuple(raw[:-1])
    return Batch(inputs, torch.as_tensor(raw[-1]), raw)


class Data:
    """Three parts.

    ``label`` is what they are called, ``samples`` how large they are (None: not known), ``notes`` what was decided
    about them. ``batch_size`` is None where loaders choose it.
    """

    label: str = "the data"
    notes: tuple[str, ...] = ()
    batch_size: int | None = None
    classes: int = 0
    task: str = ""

    def stream(self, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Training batches without end, the same for the same seed, from number ``skip`` on."""
        raise NotImplementedError

    def part(self, name: str) -> Iterable[Batch]:
        """The batches of "validation" or "test", in one order."""
        raise NotImplementedError

    def samples(self) -> tuple[int, ...]:
        """Samples of the three parts."""
        raise NotImplementedError

    def restore(self) -> None:
        """Leave no trace in what belongs to the user."""

    def fingerprint(self) -> str:
        """Of the values: the first batch of each part."""
        digest = hashlib.sha256(repr(self.samples()).encode())
        for batch in (next(self.stream(0)), *(next(iter(self.part(name))) for name in PARTS[1:])):
            for leaf in pytree.tree_leaves((batch.inputs, batch.target)):
                if isinstance(leaf, Tensor):
                    digest.update(np.ascontiguousarray(leaf.detach().cpu().double().numpy()).tobytes())
        return digest.hexdigest()[:16]


class ArrayData(Data):
    """Tensors in memory, split once: ``parts`` holds, by name, the indices of each part."""

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor,
        parts: Mapping[str, Tensor],
        batch_size: int,
        *,
        label: str,
        notes: Sequence[str] = (),
        task: str = "",
        classes: int = 0,
    ) -> None:
        self.inputs, self.target, self.parts = inputs, target, dict(parts)
        self.label, self.notes, self.task, self.classes = label, tuple(notes), task, classes
        count = len(self.parts["train"])
        # Two batches an epoch at least: else the order of samples would make no difference.
        self.batch_size = min(batch_size, max(count // 2, 1))
        if self.batch_size < 2:
            raise InputError(f"{label}: expected 4 training samples or more, got {count}")

    def stream(self, seed: int, skip: int = 0) -> Iterator[Batch]:
        """A fresh permutation for each epoch; a last part smaller than a batch is left out."""
        assert self.batch_size is not None
        train, size = self.parts["train"], self.batch_size
        generator = torch.Generator().manual_seed(seed)
        each = len(train) // size
        while True:
            order = train[torch.randperm(len(train), generator=generator)]
            first, skip = min(skip, each), max(skip - each, 0)
            for place in range(first, each):
                yield self._batch(order[place * size : (place + 1) * size])

    def part(self, name: str) -> Iterator[Batch]:
        """In order; larger batches, as nothing is kept for gradients."""
        assert self.batch_size is not None
        chosen = self.parts[name]
        for start in range(0, len(chosen), size := max(4 * self.batch_size, 256)):
            yield self._batch(chosen[start : start + size])

    def samples(self) -> tuple[int, ...]:
        """Samples of the three parts."""
        return tuple(len(self.parts[name]) for name in PARTS)

    def _batch(self, chosen: Tensor) -> Batch:
        inputs = tuple(tensor[chosen] for tensor in self.inputs)
        target = self.target[chosen]
        first = inputs[0] if len(inputs) == 1 else inputs
        return Batch(first, target, (first, target))


class LoaderData(Data):
    """DataLoaders, or whatever can be gone through more than once.

    With two, every second batch of the last is for validation and the others for the test. Each epoch is drawn under a
    seed of its own, so that a loader that shuffles or augments does so alike for every variant, and after a resume.

    Raises:
        InputError: other than two or three loaders; one without batches; one training batch alone.
    """

    def __init__(self, loaders: Sequence[Any], label: str = "loaders") -> None:
        if len(loaders) not in (2, 3):
            raise InputError(f"expected two or three loaders (train, validation, test), got {len(loaders)}")
        for loader, name in zip(loaders, PARTS, strict=False):
            if isinstance(loader, Iterator):
                raise InputError(f"expected a {name} loader that can be gone through again, got an iterator")
        self.loaders, self.label = tuple(loaders), label
        self._generators = [(held, held.get_state()) for loader in loaders for held in _generators(loader)]
        self.notes = tuple(self._checked())

    def _checked(self) -> list[str]:
        notes = []
        train = [len(self.batch(raw)) for _, raw in zip(range(3), self._epoch(0, 0, 0), strict=False)]
        usable = sum(size > 1 for size in train)
        if usable < 2:
            raise InputError(
                f"expected a training loader of two batches or more, of two samples or more each, got {len(train)} "
                f"of {train[0] if train else 0}: give it a smaller batch_size and shuffle=True"
            )
        sampler = getattr(self.loaders[0], "sampler", None)
        if isinstance(sampler, torch.utils.data.SequentialSampler):
            notes.append("The training loader does not shuffle: seeds differ in their initial weights alone.")
        if len(self.loaders) == 2:
            notes.append("Two loaders: every second batch of the last is for validation, the others for the test.")
        for name in PARTS[1:]:
            if next(iter(self.part(name)), None) is None:
                more = "give a third loader, or the last a smaller batch_size" if len(self.loaders) == 2 else "fill it"
                raise InputError(f"expected at least one batch of {name} data, got none: {more}")
        return notes

    def batch(self, raw: Any) -> Batch:
        """A loader's batch as the comparison's."""
        return split_batch(raw)

    def stream(self, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Batches of a single sample are left out: no variance is in them."""
        epoch = 0
        while True:
            for raw in self._epoch(0, seed, epoch):
                batch = self.batch(raw)
                if len(batch) < 2:
                    continue
                if skip:
                    skip -= 1
                    continue
                yield batch
            epoch += 1

    def part(self, name: str) -> Iterator[Batch]:
        """As the loader gives them, under a seed of their own."""
        place = min(PARTS.index(name), len(self.loaders) - 1)
        for number, raw in enumerate(self._epoch(place, 0, 0)):
            if len(self.loaders) == 3 or (number % 2 == 0) == (name == "validation"):
                yield self.batch(raw)

    def samples(self) -> tuple[int, ...]:
        """Counted, but for the training part, where it is the loader's own word (0: it has none)."""
        counted = [sum(len(batch) for batch in self.part(name)) for name in PARTS[1:]]
        return (_length(self.loaders[0]), *counted)

    def restore(self) -> None:
        """The loaders' own generators go on from where they were."""
        for generator, state in self._generators:
            generator.set_state(state)

    def _epoch(self, place: int, seed: int, epoch: int) -> Iterator[Any]:
        loader = self.loaders[place]
        own = _Randomness(1_000_003 * (seed + 1) + epoch)
        for generator in _generators(loader):
            generator.manual_seed(1_000_003 * (seed + 1) + epoch)
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        with own:
            batches = iter(loader)
        while True:
            with own:
                try:
                    raw = next(batches)
                except StopIteration:
                    return
            yield raw


class _Randomness:
    """Random states of its own for what is done inside: what a loader draws does not depend on the model's dropout."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        keeper = random.Random(seed)
        self.states: tuple[Any, Any, Any] = (
            generator.get_state(),
            keeper.getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
        )
        self.outside: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> None:
        self.outside = self._now()
        self._set(self.states)

    def __exit__(self, *_: object) -> None:
        assert self.outside is not None
        self.states = self._now()
        self._set(self.outside)

    @staticmethod
    def _now() -> tuple[Any, Any, Any]:
        return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002

    @staticmethod
    def _set(states: tuple[Any, Any, Any]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


@contextlib.contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Random states are afterwards as before."""
    keeper = _Randomness(0)
    keeper.states = _Randomness._now()
    with keeper:
        yield


def _generators(loader: Any) -> list[torch.Generator]:
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _length(loader: Any) -> int:
    for owner in (getattr(loader, "dataset", None), loader):
        with contextlib.suppress(TypeError):
            if owner is not None:
                return len(owner)
    return 0
