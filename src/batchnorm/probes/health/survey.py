"""What the batches show: the passes through a model that all rules about data share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from batchnorm.nn import SyncBatchNorm
from batchnorm.ops.arguments import positions
from batchnorm.probes.feeding import feed, size_of, undisturbed
from batchnorm.probes.health.measured import SAMPLED, Parting, sampled
from batchnorm.probes.health.observed import Observed
from batchnorm.probes.health.seen import Input, NotFinite, claimed_padding, hookable

if TYPE_CHECKING:
    from batchnorm.probes.health.subject import Subject

MAX_BATCHES = 64
"""As many batches are looked at. They are read once and none is kept."""


class Survey:
    """What the batches showed.

    Every batch passes the model three times, each time with the same random numbers: in eval mode; in batch mode (batch
    norms normalize by their batch and everything else, dropout too, is in eval mode); and in batch mode as two halves,
    even and odd samples by themselves, to see what the noise of a batch does. Statistics of a layer are float64 and
    per channel, its outputs are compared at some 16,000 values, and nothing else is kept of a batch. Synchronised
    layers take the batch of this process: no collective is called.

    Attributes:
        layers: those that the batches reached and that normalize real numbers, in the order of the forward pass.
        sizes: the samples of each batch.
        outputs: how far the model's outputs in eval and batch mode are apart.
        flips, flips_of_halves, decisions: how many samples have another largest output in batch mode than in eval mode,
            and in a half of the batch than in the whole; out of how many. 0 where outputs are no scores of classes.
        input: what the first layer with parameters is given.
        not_finite: the first place with NaN or infinity; None without.
        claimed: the share of padding by the lengths and masks in the batches, by name, summed over batches.
    """

    def __init__(self, subject: Subject) -> None:
        self.model, self.forward_fn = subject.model, subject.forward_fn
        self.sizes: list[int] = []
        self.outputs = Parting()
        self.flips = self.flips_of_halves = self.decisions = 0
        self.input = Input()
        self.not_finite: NotFinite | None = None
        self.claimed: dict[str, float] = {}
        self._prefix = subject.prefix
        self._observed: dict[nn.Module, Observed] = {}
        self._pass = ""
        self._samples: int | None = None
        self._width = SAMPLED
        self._lengths: set[int] = set()
        self._kept: dict[str, dict[tuple[nn.Module | None, int], Tensor]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._unsteady = self._indivisible = False
        self._watched = {layer.module: layer for layer in subject.trained}
        self._learning: list[nn.Module] = []

    @classmethod
    def take(cls, subject: Subject, max_batches: int = MAX_BATCHES) -> Survey:
        """Run the model of ``subject`` on at most ``max_batches`` of its batches; it is left as it was."""
        survey = cls(subject)
        tensors = [*subject.model.parameters(), *subject.model.buffers()]
        if subject.batches is None or any(is_lazy(tensor) or tensor.device.type == "meta" for tensor in tensors):
            return survey  # without numbers there is nothing to run, and to run a lazy layer would make its own
        survey._learning = _learning(subject.model, survey._watched)
        with undisturbed(subject.model, training=False), _eager(subject.model), survey._hooked():
            for batch in itertools.islice(subject.batches, max_batches):
                survey._look(batch)
        return survey

    @property
    def layers(self) -> list[Observed]:
        """The layers that were reached."""
        return sorted(self._observed.values(), key=lambda observed: observed.place)

    def _look(self, batch: Any) -> None:
        self._samples = size_of(batch)
        self._width = max(1, SAMPLED // max(self._samples or 1, 1))
        self.sizes.append(self._samples or 0)
        claimed = claimed_padding(self.model, batch, self.forward_fn is not None)
        for key, (share, _) in claimed.items():
            self.claimed[key] = self.claimed.get(key, 0.0) + share
        self._lengths = {length for _, length in claimed.values()}
        self._kept = {"eval": {}, "batch": {}, "even": {}, "odd": {}}
        self._run("eval", batch)
        if self.not_finite is None and self._has_nonsense():
            self._pass = "again"
            self.not_finite = NotFinite.find(
                self.model, self._prefix, len(self.sizes) - 1, batch, lambda: self._feed(batch)
            )
        if not self._learning or self._unsteady:
            return
        last = [self._observed[module].evaluated.counts[-1:] for module in self._learning if module in self._observed]
        if any(count and count[0] < 2 for count in last):
            return  # training raises an error here, which is BN303's to say
        with _by_batch(self.model, self._learning):
            # A stranger's layer may refuse the mix of modes, and a batch need not be what can be cut.
            try:
                self._run("batch", batch)
            except Exception:  # noqa: BLE001
                self._unsteady = True
                return
            try:
                halved = self._run_halves(batch)
            except Exception:  # noqa: BLE001
                self._indivisible, halved = True, False
        self._compare(halved)

    def _run_halves(self, batch: Any) -> bool:
        samples = self._samples
        if self._indivisible or samples is None or samples < 4:
            return False
        self._samples = samples // 2
        try:
            for start, name in enumerate(("even", "odd")):
                self._run(name, _every_second(batch, samples, start))
        finally:
            self._samples = samples
        return True

    def _run(self, name: str, batch: Any) -> None:
        self._pass = name
        self._calls = {}
        result = self._feed(batch)
        leaves = [value for value in _leaves(result) if isinstance(value, Tensor)]
        for call, leaf in enumerate(leaves):
            kept = sampled(leaf, self._samples, self._width)
            if kept is not None:
                self._kept[name][None, call] = kept

    def _feed(self, batch: Any) -> Any:
        # Random numbers of a forward are no part of what differs between modes.
        torch.manual_seed(0)
        return feed(self.model, batch, self.forward_fn)

    def _compare(self, halved: bool) -> None:
        kept = self._kept
        for (module, call), evaluated in kept["eval"].items():
            trained = kept["batch"].get((module, call))
            if trained is None or trained.shape != evaluated.shape or len(trained) < 4:
                continue
            halves = [kept[name].get((module, call)) for name in ("even", "odd")] if halved else [None]
            together = None if any(half is None for half in halves) else torch.cat([h for h in halves if h is not None])
            if together is not None and together.shape[1:] != trained.shape[1:]:
                together = None
            parting = self.outputs if module is None else self._observed[module].parting
            parting.add(evaluated, trained, together)
            if module is None and call == 0 and trained.size(1) > 1:
                self.decisions += len(trained)
                self.flips += int((trained.argmax(1) != evaluated.argmax(1)).sum())
                if together is not None:
                    half = len(together) // 2
                    again = torch.cat([trained[0 : 2 * half : 2], trained[1 : 2 * half : 2]])
                    self.flips_of_halves += int((again.argmax(1) != together.argmax(1)).sum())
        self._kept = {}

    def _has_nonsense(self) -> bool:
        if any(bool(kept.isnan().any()) for (module, _), kept in self._kept["eval"].items() if module is None):
            return True
        return any(not bool(seen.evaluated.moments.mean.isfinite().all()) for seen in self._observed.values())

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._watched:
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._after, with_kwargs=True).remove)
            for module in self.model.modules():
                if hookable(module) and next(module.parameters(), None) is not None:
                    stack.callback(module.register_forward_pre_hook(self._first, with_kwargs=True).remove)
            yield

    def _first(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._pass == "eval":
            self.input.see(module, args, kwargs)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._pass not in ("eval", "batch"):
            return
        x, real = _given(args, kwargs)
        if x is None:
            return
        seen = self._observed.get(module)
        if seen is None:
            learns = module in self._learning
            seen = Observed(self._watched[module], len(self._observed), x.size(1), x.device, learns)
            self._observed[module] = seen
        if self._pass == "eval":
            seen.evaluated.add(x, real, self._samples)
            rows = x.size(0) // self._samples if self._samples else 0
            seen.positioned |= any(length in (rows, *x.shape[2:]) for length in self._lengths)
            if real is None:
                seen.padding.add(x)
            else:
                seen.masked = True
        else:
            seen.trained.add(x, real, self._samples)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen = self._observed.get(module)
        if seen is None or self._pass not in self._kept or not isinstance(result, Tensor) or result.is_nested:
            return
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        x, real = _given(args, kwargs)
        if self._pass == "eval" and x is not None and result.shape == x.shape and result.numel():
            seen.units.add(result.detach(), real)
        kept = sampled(result.detach(), self._samples, self._width)
        if kept is not None:
            self._kept[self._pass][module, call] = kept


def _learning(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers that normalize by their batch when ``model`` trains: those that it leaves in eval mode are frozen."""
    with undisturbed(model):
        if not model.training:
            model.train()
        return [layer for layer in layers if layer.training]


def _given(args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The input of a layer, if it is one whose channels have a mean and a variance, and which positions are real."""
    x = args[0] if args else kwargs.get("input", kwargs.get("x"))
    if not isinstance(x, Tensor) or x.is_nested or x.is_quantized or not x.is_floating_point() or x.dim() < 2:
        return None, None
    if x.numel() == 0:
        return None, None
    mask, lengths = kwargs.get("mask"), kwargs.get("lengths")
    real = positions(x, mask, lengths) if isinstance(mask, Tensor) or isinstance(lengths, Tensor) else None
    return x.detach(), real


def _leaves(result: Any) -> list[Any]:
    leaves = pytree.tree_leaves(result)
    # Outputs of other libraries are often dictionaries that pytree does not know.
    return [
        inner for leaf in leaves for inner in (pytree.tree_leaves(dict(leaf)) if isinstance(leaf, dict) else [leaf])
    ]


def _every_second(batch: Any, samples: int, start: int) -> Any:
    """Every second sample of a batch, from ``start`` on."""
    return pytree.tree_map_only(
        Tensor,
        lambda t: t[start : samples // 2 * 2 : 2] if t.dim() and t.size(0) == samples else t,
        batch,
    )


@contextmanager
def _by_batch(model: nn.Module, learning: list[nn.Module]) -> Iterator[None]:
    """Batch norms normalize by the batch of this process; what they remember of it is forgotten afterwards."""
    hidden: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    with undisturbed(model):
        try:
            for module in learning:
                if isinstance(module, nn.SyncBatchNorm | SyncBatchNorm):
                    # In eval mode they talk to nobody, and without running averages they take their batch.
                    names = ("running_mean", "running_var")
                    hidden.append((module, {name: module._buffers[name] for name in names}))
                    module._buffers.update(dict.fromkeys(names))
                else:
                    module.training = True
            yield
        finally:
            for module, buffers in hidden:
                module._buffers.update(buffers)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Parts that were compiled in place run as they are written, so that hooks see them."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
