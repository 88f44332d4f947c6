"""What is measured: shapes, layouts, layers; in groups, each of which is one process, so that none runs long."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import torch

BN, RELU, ADD = "BN", "BN+ReLU", "BN+add+ReLU"
CONTIGUOUS, LAST = "contiguous", "channels_last"
CONV = ((64, 64, 56, 56), (64, 256, 28, 28), (32, 64, 112, 112), (2, 64, 128, 128), (16, 64, 8192))
TINY = ((32, 16), (8, 8, 4, 4), (256, 100))
SWEEP = 64  # random shapes


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        peers: which candidates run beside torch's and ours: "floor", "onednn", "in place", "compiled", and our "ghost"
            (virtual batches of a quarter of the batch), "renorm", "frozen" and "masked" (a fifth is padding).
    """

    shape: tuple[int, ...]
    layout: str = CONTIGUOUS
    layer: str = RELU
    dtype: torch.dtype = torch.float32
    training: bool = True
    peers: frozenset[str] = frozenset()
    part: str = ""


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The memory orders there are for a shape: (N, C) has one."""
    return (CONTIGUOUS, LAST) if len(shape) > 2 else (CONTIGUOUS,)


def group(name: str, quick: bool) -> Iterator[Case]:
    """The cases of a group."""
    if name in (CONTIGUOUS, LAST):
        for shape in CONV[1:4:2] if quick else CONV:
            for layer in (BN, RELU, ADD):
                peers = {BN: {"floor", "onednn"}, RELU: {"floor", "onednn", "in place"}, ADD: set()}[layer]
                yield Case(shape, name, layer, peers=frozenset(peers), part="conv")
    elif name == "others":
        yield from _others(quick)
    elif name == "sweep":
        yield from sweep()
    elif name == "compiled":
        for layout in (CONTIGUOUS, LAST):
            yield Case((64, 64, 56, 56), layout, peers=frozenset({"compiled"}), part="compiled")


def _others(quick: bool) -> Iterator[Case]:
    peers = frozenset({"floor", "onednn"})
    for layout in (CONTIGUOUS, LAST):
        yield Case((128, 512, 7, 7), layout, peers=peers, part="7x7")
    yield Case((4096, 1024), peers=peers, part="4096x1024")
    for shape in TINY:
        for layout in layouts(shape):
            yield Case(shape, layout, peers=frozenset({"onednn"}), part="tiny")
    for shape in CONV[1:2] if quick else CONV[:2]:
        for layout in (CONTIGUOUS, LAST):
            yield Case(shape, layout, dtype=torch.bfloat16, part="bfloat16")
    for shape in CONV[1:2] if quick else (*CONV[:2], (128, 512, 7, 7), (4096, 1024), (256, 100)):
        for layout in layouts(shape):
            yield Case(shape, layout, peers=frozenset({"ghost", "renorm", "frozen", "masked"}), part="family")
    for shape in CONV[1:2] if quick else (*CONV[:2], CONV[3], (128, 512, 7, 7), (256, 100)):
        for layout in layouts(shape):
            yield Case(shape, layout, training=False, part="inference")


def sweep() -> Iterator[Case]:
    """Random shapes, small and medium, always the same."""
    draw = random.Random(3)
    for number in range(SWEEP):
        channels = draw.choice((1, 2, 3, 5, 8, 16, 17, 32, 48, 64, 100, 128, 256, 512, 1000))
        dims = draw.choice((2, 3, 4, 4, 4))
        side = draw.choice((1, 2, 3, 4, 7, 8, 14, 15, 28, 33, 56))
        positions = () if dims == 2 else (side * draw.choice((1, 8)),) if dims == 3 else (side, side)
        room = 2_000_000 if number % 3 else 40_000  # values: a third of the shapes are small
        each = channels * (1 if not positions else positions[0] * positions[-1] if dims == 4 else positions[0])
        n = max(2, min(draw.choice((2, 4, 16, 60, 128, 1024)), room // each))
        shape = (n, channels, *positions)
        yield Case(shape, draw.choice(layouts(shape)), draw.choice((BN, RELU)), part="sweep")
