"""What is done to a model, by whichever process does it: it is made, takes a step, is measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import InputError
from batchnorm.probes.feeding import ForwardFn
from batchnorm.study.comparison.building import Builder, Deferred, as_inputs, seeded
from batchnorm.study.comparison.data import Batch, Data, undisturbed_randomness
from batchnorm.study.comparison.objective import Objective, logits
from batchnorm.study.comparison.variants import Variant

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr),
}
AMP = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Job:
    """All that a run needs besides its own parameters. Travels to worker processes.

    ``source`` and ``data`` may be :class:`Deferred`: then each process loads its own.
    """

    source: Any
    data_source: Any
    variants: tuple[Variant, ...]
    objective: Objective
    optimizer: str | Callable[[Any, float], torch.optim.Optimizer] = "sgd"
    forward_fn: ForwardFn | None = None
    device: str = "cpu"
    amp: str = ""
    compile: bool = False
    threads: int = 0
    states: Path | None = None
    tensorboard: Path | None = None
    checkpoint_every: float = 30.0
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Another process loads what is deferred anew; the rest it gets.
        kept = {} if isinstance(self.data_source, Deferred) else {"data": self._loaded.get("data")}
        return {**vars(self), "_loaded": {key: value for key, value in kept.items() if value is not None}}

    @property
    def data(self) -> Data:
        """The data, loaded once a process."""
        return self._once("data", lambda: _load(self.data_source))

    @property
    def builder(self) -> Builder:
        """What makes the models."""

        def made() -> Builder:
            return Builder(_load(self.source), next(self.data.stream(0)).inputs, self.forward_fn)

        return self._once("builder", made)

    @property
    def label(self) -> str:
        """What the model is called."""
        return self.builder.label

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._loaded[name] = make()
        return self._loaded[name]

    def variant(self, name: str) -> Variant:
        """The variant of this name."""
        return next(variant for variant in self.variants if variant.name == name)

    def build(self, name: str, seed: int) -> tuple[nn.Module, tuple[int, int]]:
        """A model on the device, with the initial weights of the first variant where they fit; and how many did."""
        model = self.builder.build(self.variant(name), seed)
        reference = model if name == self.variants[0].name else self.builder.build(self.variants[0], seed)
        same = self.builder.begin_alike(model, reference)
        return model.to(self.device), same

    def compiled(self, model: nn.Module) -> Any:
        """What is called in training: the model, compiled where that is asked for."""
        return torch.compile(model) if self.compile else model

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer of a model at a rate."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise InputError("expected a model with parameters to train, got none that requires a gradient")
        make = OPTIMIZERS[self.optimizer] if isinstance(self.optimizer, str) else self.optimizer
        return make(parameters, lr)

    def stream(self, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Training batches; the same for every variant."""
        return self.data.stream(seed, skip)

    def output(self, model: Any, batch: Batch) -> Any:
        """What the model gives for a batch, under autocast where that is asked for."""
        dtype = AMP[self.amp]
        with torch.autocast(torch.device(self.device).type, dtype) if dtype else contextlib.nullcontext():
            if self.forward_fn is not None:
                return self.forward_fn(model, batch.inputs if batch.raw is None else batch.raw)
            positional, named = as_inputs(batch.inputs)
            return model(*positional, **named)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a training batch, on the device already."""
        return self.objective.of(self.output(model, batch), batch.target)

    def first_loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a model that nothing is known of.

        Raises:
            InputError: its output does not fit the target.
        """
        output = self.output(model, batch)
        self.objective.check(output, batch.target)
        return self.objective.of(output, batch.target)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """``metric`` and ``loss`` over a part, in eval mode; NaN where an output is no number."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        total, count = 0.0, 0
        outputs: list[Tensor] = []
        targets: list[Tensor] = []
        try:
            with undisturbed_randomness():
                for item in self.data.part(part):
                    batch = item.to(torch.device(self.device))
                    output = self.output(model, batch)
                    total += float(self.objective.of(output, batch.target)) * len(batch)
                    count += len(batch)
                    outputs.append(logits(output).float())
                    targets.append(batch.target)
        finally:
            for module, mode in modes.items():
                module.training = mode
        loss = total / max(count, 1)
        joined = torch.cat(outputs)
        finite = bool(joined.isfinite().all())
        value = self.objective.value(joined, torch.cat(targets), loss) if finite else math.nan
        return {"metric": value, "loss": loss if finite else math.nan}

    @contextlib.contextmanager
    def computing(self, seed: int) -> Iterator[None]:
        """The threads that were asked for, and random numbers from ``seed``; both as before afterwards."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        devices = [torch.device(self.device)] if self.device.startswith("cuda") else []
        try:
            with undisturbed_randomness(), torch.random.fork_rng(devices):
                seeded(seed)
                yield
        finally:
            torch.set_num_threads(before)


def _load(source: Any) -> Any:
    return source.load() if isinstance(source, Deferred) else source


def scaler(job: Job) -> Any:
    """The gradient scaler that float16 needs; it does nothing for other types."""
    return torch.amp.GradScaler(torch.device(job.device).type, enabled=job.amp == "fp16")


def step(job: Job, model: Any, optimizer: Any, scale: Any, batch: Batch) -> Tensor:
    """One step of training; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = job.loss(model, batch)
    scale.scale(loss).backward()
    scale.step(optimizer)
    scale.update()
    return loss.detach()


def synchronized(device: str) -> None:
    """Wait for what is under way on the device, so that a clock tells the truth."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def as_records(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: None is what stands in records."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
