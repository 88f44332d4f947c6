"""Comparing inside Lightning's Trainer. The only file of the study that imports lightning."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, MissingDependencyError
from batchnorm.probes.feeding import size_of
from batchnorm.study.comparison import CompareConfig, Comparison, settings, variants
from batchnorm.study.comparison.api import fingerprint, run
from batchnorm.study.comparison.building import normalized, seeded
from batchnorm.study.comparison.data import Batch, LoaderData, undisturbed_randomness
from batchnorm.study.comparison.job import Job
from batchnorm.study.comparison.objective import Objective

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingDependencyError(
        "batchnorm.study.lightning needs lightning, which is not installed: pip install 'batchnorm[lightning]'"
    ) from error

log = logging.getLogger("batchnorm.study")


class CompareCallback(Callback):
    """Before a Trainer trains a module, compares the module with variants of its normalization, then lets it train.

    >>> callback = CompareCallback(("batch", "group", "none"), budget="5m")       # doctest: +SKIP
    >>> Trainer(callbacks=[callback]).fit(module, train, val)                      # doctest: +SKIP
    >>> print(callback.comparison.verdict)                                         # doctest: +SKIP

    What is compared are copies, with the module's own ``training_step``, ``validation_step``, ``configure_optimizers``
    (the first optimizer, its rate set, without schedules) and the Trainer's loaders and precision; the module, its
    loaders' generators and the random state are afterwards as before. The copies know no Trainer: a step that asks
    ``self.trainer`` cannot be compared. Batch norms of the module are replaced, or inserted where it has none. Of the
    validation loader every second batch serves the search and the curves, the others are the test; ``test`` names a
    loader to take instead. In a distributed run the first process compares and the others wait.

    The verdict is logged to the logger "batchnorm.study", and as ``compare/<variant>/difference`` to the Trainer's.

    Args:
        variants, lrs, seeds, budget, steps, out, resume: as of :func:`batchnorm.compare`.
        monitor: what ``validation_step`` logs by this name is compared; None for the loss that it returns.
        mode: whether "min" or "max" of it is better.
        reset: draw new initial weights for each seed, by each layer's own ``reset_parameters``; else every seed starts
            from the module's weights and only orders differ.
        test: a loader of test data.

    Attributes:
        comparison: the :class:`batchnorm.study.comparison.Comparison`, once the fit has begun.

    Raises:
        InputError: manual optimization, no validation data, or a step that does not give a loss; and as
            :func:`batchnorm.compare`.
    """

    def __init__(
        self,
        variants: Any = ("none", "batch"),
        budget: str | float = "45s",
        *,
        steps: int | None = None,
        lrs: str | float | Sequence[float] = "auto",
        seeds: int = 3,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        reset: bool = False,
        test: Any = None,
        seed: int = 0,
        out: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        self.variants, self.lrs, self.seeds, self.seed = variants, lrs, seeds, seed
        self.budget, self.steps = 0.0 if steps else settings.seconds(budget), steps or 0
        self.monitor, self.higher, self.reset, self.test = monitor, mode == "max", reset, test
        self.out, self.resume = out, resume
        self.comparison: Comparison | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and say what came out."""
        if trainer.is_global_zero:
            self.comparison = self._compared(trainer, pl_module)
            log.info("%s", self.comparison.verdict)
            found = {
                f"compare/{item.variant}/difference": item.difference.mean
                for item in self.comparison.verdict.judgements
                if item.difference is not None
            }
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)
        trainer.strategy.barrier()

    def _compared(self, trainer: Trainer, module: LightningModule) -> Comparison:
        if not module.automatic_optimization:
            raise InputError("expected a module of automatic optimization, got a manual one: its steps cannot be taken")
        data = _LightningData(self._loaders(trainer), f"the Trainer's loaders of {type(module).__name__}")
        size = size_of(next(data.stream(0)).raw) or 1
        named = variants.read(self.variants, size)
        device = module.device
        job = _LightningJob(
            source=module,
            data_source=data,
            variants=named,
            objective=Objective("", 0, self.monitor or "loss", self.higher),
            device=str(device),
            trainer=trainer,
            reset=self.reset,
        )
        job._loaded["data"] = data
        start = "new initial weights for each seed" if self.reset else "every seed starts from the module's weights"
        config = CompareConfig(
            model=type(module).__name__,
            data="the Trainer's loaders",
            variants=tuple(variant.name for variant in named),
            lrs=settings.rates(self.lrs, "adam" if "Adam" in type(job.make_optimizer(module, 1.0)).__name__ else "sgd"),
            auto=self.lrs == "auto",
            seeds=self.seeds,
            seed=self.seed,
            budget=self.budget,
            steps=self.steps,
            metric=self.monitor or "loss",
            higher=self.higher,
            task="the module's own",
            classes=0,
            optimizer="the module's own, without its schedules",
            batch_size=size,
            device=str(device),
            amp=str(trainer.precision),
            compile=False,
            workers=1,
            threads=0,
            samples=data.samples(),
            fingerprint=fingerprint(data, job, self.seed),
            notes=(*data.notes, f"Copies of {type(module).__name__} with its own steps and optimizer; {start}."),
            command="CompareCallback(...)",
        )
        return run(config, job, self.out, resume=self.resume)

    def _loaders(self, trainer: Trainer) -> list[Any]:
        train = trainer.train_dataloader
        held: Any = trainer.val_dataloaders
        if held is None:
            # Without a sanity check they are set up when they are first needed.
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            held = trainer.val_dataloaders
        held = held[0] if isinstance(held, list | tuple) and held else held
        if train is None or not held:
            raise InputError("expected training and validation loaders to compare with, got none: give fit both")
        return [train, held] if self.test is None else [train, held, self.test]


class _LightningData(LoaderData):
    """Batches of whatever kind the module's steps take."""

    def batch(self, raw: Any) -> Batch:
        return Batch((), torch.zeros(size_of(raw) or 1), raw)


class _LightningJob(Job):
    """A job whose steps are a module's own."""

    def __init__(self, *, trainer: Trainer, reset: bool, **options: Any) -> None:
        super().__init__(**options)
        self.precision, self.reset = trainer.precision_plugin, reset

    @property
    def label(self) -> str:
        return type(self.source).__name__

    def build(self, name: str, seed: int) -> tuple[nn.Module, tuple[int, int]]:
        variant = self.variant(name)
        seeded(seed)
        model = _copied(self.source)
        if self.reset:
            for layer in model.modules():
                if callable(again := getattr(layer, "reset_parameters", None)):
                    again()
        before = {id(parameter): parameter.numel() for parameter in model.parameters()}
        example = next(self.data.stream(0)).to(torch.device(self.device)).raw
        with undisturbed_randomness():
            model = normalized(model, variant, example, lambda module, batch: _step(module, "training_step", batch))
        same = sum(before.get(id(parameter), 0) for parameter in model.parameters())
        return model, (same, sum(before.values()))

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        found: Any = model.configure_optimizers()  # type: ignore[operator]
        while not isinstance(found, torch.optim.Optimizer):
            found = found.get("optimizer") if isinstance(found, dict) else found[0] if found else None
            if found is None:
                raise InputError("expected configure_optimizers to give an optimizer, got none")
        for group in found.param_groups:
            group["lr"] = lr
        return found

    def loss(self, model: Any, batch: Batch) -> Tensor:
        with self.precision.forward_context():
            found = _step(model, "training_step", batch.raw)
        loss = found.get("loss") if isinstance(found, dict) else found
        if not isinstance(loss, Tensor):
            raise InputError(f"expected training_step to give a loss, got {type(found).__name__}")
        return loss

    first_loss = loss

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        modes = {module: module.training for module in model.modules()}
        name = self.objective.metric
        total, count, metrics = 0.0, 0, set()
        model.eval()
        try:
            with undisturbed_randomness(), self.precision.forward_context():
                for item in self.data.part(part):
                    batch = item.to(torch.device(self.device))
                    logged: dict[str, Any] = {}
                    with _logging(model, logged):
                        found = _step(model, "validation_step", batch.raw)
                    value = logged.get(name)
                    if value is None and name == "loss":
                        value = found.get("loss") if isinstance(found, dict) else found
                    if value is None:
                        raise InputError(
                            f"expected validation_step to {'return a loss' if name == 'loss' else f'log {name!r}'}, it "
                            f"logs {', '.join(logged) or 'nothing'}: name one of them as monitor="
                        )
                    if callable(getattr(value, "compute", None)):
                        metrics.add(value)
                        continue
                    total += float(value) * len(batch)
                    count += len(batch)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if metrics:
            metric: Any = metrics.pop()
            whole = float(metric.compute())
            metric.reset()
        else:
            whole = total / max(count, 1)
        return {"metric": whole, "loss": whole}


def _step(model: Any, name: str, batch: Any) -> Any:
    """A step of a module without a Trainer: what it logs is let go where nobody keeps it."""
    with contextlib.ExitStack() as stack:
        if "log" not in vars(model):
            stack.enter_context(_logging(model, {}))
        step = getattr(model, name)
        return step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)


@contextlib.contextmanager
def _logging(model: Any, kept: dict[str, Any]) -> Iterator[None]:
    """``self.log`` and ``self.log_dict`` write into ``kept``."""

    def one(name: str, value: Any, *_: Any, **__: Any) -> None:
        kept[name] = value

    def many(values: Any, *_: Any, **__: Any) -> None:
        kept.update(values)

    vars(model)["log"], vars(model)["log_dict"] = one, many
    try:
        yield
    finally:
        del vars(model)["log"], vars(model)["log_dict"]


def _copied(module: LightningModule) -> Any:
    """A copy that knows no Trainer, which would be copied with it."""
    held = {name: vars(module).get(name) for name in ("_trainer", "_fabric")}
    vars(module).update(dict.fromkeys(held))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(module)
    finally:
        vars(module).update(held)
