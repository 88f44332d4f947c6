"""Batch norms and the layers that take them up, found in a wiring, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchnorm.probes.wiring import Step, Wiring
from batchnorm.surgery.folding import channels
from batchnorm.surgery.folding.norms import Affine
from batchnorm.surgery.folding.taking import Left, Taker, Write, mix_outputs, scale_inputs, scale_outputs


@dataclass
class Norm:
    """A batch norm of a model or a program.

    Attributes:
        name, kind: its path, its class or operator.
        calls: its steps.
        affine: gives its numbers of now, or raises :class:`Left`.
        plain: whether nothing follows in it, no activation.
        remove: takes it out of the model, once another layer does its work.
        as_taker: itself as a layer that takes up others, where it can.
        reasons: why it is left, as far as is known.
        blocked: whether it is left whatever is around it.
        into: labels of the layers that took it up, or None.
        forward: whether they are behind it, so that what comes out of it is another number now.
    """

    name: str
    kind: str
    calls: list[Step]
    affine: Callable[[], Affine]
    plain: bool
    remove: Callable[[], None]
    as_taker: Taker | None = None
    reasons: list[str] = field(default_factory=list)
    blocked: bool = False
    into: list[str] | None = None
    forward: bool = False


@dataclass
class Match:
    """A layer and which channel of the batch norm each of its channels is, -1 where it is none."""

    taker: Taker
    owners: Tensor


class Plan:
    """Folds what can be folded.

    Args:
        wiring: of the model; its steps are changed as batch norms disappear.
        takers: the layers at steps, by index; a layer that is called twice is at two.
        norms: the batch norms, in the order of execution.
        guard: raises :class:`Left` where a batch norm and a layer must not be joined, with the steps between them.
    """

    def __init__(
        self,
        wiring: Wiring,
        takers: dict[int, Taker],
        norms: list[Norm],
        guard: Callable[[Norm, Taker, list[Step]], None] = lambda *_: None,
    ) -> None:
        self.wiring, self.takers, self.norms, self.guard = wiring, takers, norms, guard
        self.calls: dict[int, set[int]] = {}
        for index, taker in takers.items():
            self.calls.setdefault(id(taker), set()).add(index)

    @torch.no_grad()
    def run(self) -> None:
        """Into the layer before, in order; else into the layer behind, from the end; else into each other."""
        for norm in self.norms:
            self._attempt(norm, self._before)
        for norm in reversed(self.norms):
            self._attempt(norm, self._behind)
        for norm in self.norms:
            if norm.into is None and norm.as_taker is not None:
                self.takers.update({step.index: norm.as_taker for step in norm.calls})
                self.calls[id(norm.as_taker)] = {step.index for step in norm.calls}
        for norm in self.norms:
            self._attempt(norm, self._before)

    def _attempt(self, norm: Norm, way: Callable[[Norm], list[Taker]]) -> None:
        if norm.into is not None or norm.blocked:
            return
        try:
            takers = way(norm)
        except Left as left:
            if str(left) not in norm.reasons:
                norm.reasons.append(str(left))
            return
        norm.into = [taker.label for taker in takers]
        norm.forward = way == self._behind
        norm.remove()
        for step in norm.calls:
            self.takers.pop(step.index, None)
            step.passes = norm.plain

    def _before(self, norm: Norm) -> list[Taker]:
        affine = norm.affine()
        matches: dict[int, Match] = {}
        reached: dict[int, set[int]] = {}
        for step in norm.calls:
            sources, between = channels.before(self.wiring, step, set(self.takers))
            found = [self.takers[source.index] for source in sources]
            for taker in found:
                if taker is norm.as_taker:
                    raise Left("its input is its own output")
                self._check(norm, taker, between)
            owners = self._owners(step, sources, found, between, len(affine.shift))
            for source, match in zip(sources, owners, strict=True):
                key = id(match.taker)
                if key in matches and not torch.equal(matches[key].owners, match.owners):
                    raise Left(f"calls of {match.taker.label} have different channels of it")
                matches[key] = match
                reached.setdefault(key, set()).add(source.index)
        self._check_calls(matches, reached)
        for write in [_joined(match, affine) for match in matches.values()]:
            write()
        return [match.taker for match in matches.values()]

    def _owners(
        self, step: Step, sources: list[Step], takers: list[Taker], between: list[Step], width: int
    ) -> list[Match]:
        rank = len(step.input_shape or ())  # known, or there would be no sources
        if all(each.passes for each in between):
            if takers[0].axis % rank != 1 or takers[0].outputs != width:
                raise Left(f"its channels are along another axis than those of {takers[0].label}")
            return [Match(takers[0], torch.arange(width))]
        known, names, first = {}, [], 0
        for source, taker in zip(sources, takers, strict=True):
            shape = source.output_shape
            names.append(channels.labels(taker.outputs, first))
            known[source.index] = channels.spread(names[-1], shape, taker.axis)
            first += taker.outputs
        found = channels.replay(self.wiring, step.inputs[0], known)
        channel, label = channels.pairs(found.movedim(1, 0).flatten(1), torch.cat(names))
        owner = torch.full((first,), -1).scatter(0, label, channel)
        if not torch.equal(owner[label], channel):
            raise Left(f"a channel of {takers[0].label} is in several of its channels")
        sizes = [taker.outputs for taker in takers]
        return [Match(taker, part) for taker, part in zip(takers, owner.split(sizes), strict=True)]

    def _behind(self, norm: Norm) -> list[Taker]:
        affine = norm.affine()
        if affine.scale.dim() != 1:
            raise Left("it mixes channels, which only a layer before it can take up")
        if not norm.plain:
            raise Left("an activation is a part of it")
        matches: dict[int, Match] = {}
        reached: dict[int, set[int]] = {}
        for step in norm.calls:
            readers, between = channels.behind(self.wiring, step, set(self.takers))
            for reader in readers:
                taker = self.takers[reader.index]
                self._check(norm, taker, between)
                match = Match(taker, self._read(step, reader, taker, between, len(affine.shift)))
                key = id(taker)
                if key in matches and not torch.equal(matches[key].owners, match.owners):
                    raise Left(f"calls of {taker.label} read different channels of it")
                matches[key] = match
                reached.setdefault(key, set()).add(reader.index)
        self._check_calls(matches, reached)
        scale, shift = affine.scale, affine.shift
        for write in [scale_inputs(m.taker, scale[m.owners], shift[m.owners]) for m in matches.values()]:
            write()
        return [match.taker for match in matches.values()]

    def _read(self, step: Step, reader: Step, taker: Taker, between: list[Step], width: int) -> Tensor:
        if all(each.passes for each in between) and reader.input_shape:
            if taker.axis % len(reader.input_shape) != 1 or taker.inputs != width:
                raise Left(f"its channels are along another axis than those of {taker.label}")
            return torch.arange(width)
        names = channels.labels(width)
        known = {step.index: channels.spread(names, step.output_shape, 1)}
        found = channels.replay(self.wiring, reader.inputs[0], known)
        rows = found.movedim(taker.axis, 0).flatten(1)
        if len(rows) != taker.inputs or not torch.equal(rows, rows[:, :1].expand_as(rows)):
            raise Left(f"its channels are along another axis than those of {taker.label}")
        return channels.which(rows[:, 0], names)

    def _check(self, norm: Norm, taker: Taker, between: list[Step]) -> None:
        if taker.refusal is not None:
            raise Left(f"{taker.label} cannot take it up: {taker.refusal}")
        self.guard(norm, taker, between)

    def _check_calls(self, matches: dict[int, Match], reached: dict[int, set[int]]) -> None:
        for key, match in matches.items():
            if reached[key] != self.calls[key]:
                raise Left(f"{match.taker.label} is called elsewhere too, without it")


def _joined(match: Match, affine: Affine) -> Write:
    owners, taker = match.owners, match.taker
    if affine.scale.dim() == 1:
        mine = owners >= 0
        scale, shift = torch.where(mine, affine.scale[owners], 1.0), torch.where(mine, affine.shift[owners], 0.0)
        return scale_outputs(taker, scale, shift)
    if not torch.equal(owners, torch.arange(len(affine.shift))):
        raise Left("it mixes channels that are not those of one layer, in their order")
    return mix_outputs(taker, affine.scale, affine.shift)
