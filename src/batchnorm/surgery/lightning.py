"""A callback for Lightning's Trainer: recalibrates batch norms before they are used for inference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, MissingDependencyError
from batchnorm.probes.feeding import ForwardFn
from batchnorm.surgery.recalibrate import recalibrate
from batchnorm.surgery.selection import Layers

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as missing:
    raise MissingDependencyError(
        "expected Lightning, which is not installed: pip install 'batchnorm[lightning]'"
    ) from missing


class RecalibrateCallback(Callback):
    """Calls :func:`batchnorm.recalibrate` on the module that is trained, with batches of its training data.

    Args:
        num_batches: how many batches, of each rank; None for all.
        when: "fit_end": when training is over, before ModelCheckpoint's last save. "validation": before each validation
            of a fit (not the sanity check), so that what is validated, and saved for it, has the statistics of its
            weights.
        batches: what to use instead of the training data.
        forward_fn, method, until, layers: as of :func:`batchnorm.recalibrate`. The module's ``forward`` is called with
            the inputs of a batch (inputs, targets), under the trainer's precision.

    Put it behind callbacks that change weights, such as Lightning's WeightAveraging: it is the averaged model that is
    to be recalibrated. Under a distributed strategy the ranks pool their batches. ``bn.changes(module)`` says what the
    latest call did.

    Raises:
        InputError: (ValueError) another ``when``; there are no training data; or a validation in the middle of an epoch
            would restart workers that the training is reading from (``persistent_workers``).
        As :func:`batchnorm.recalibrate`, and the module is as it was.
    """

    def __init__(
        self,
        num_batches: int | None = 200,
        when: Literal["fit_end", "validation"] = "fit_end",
        *,
        batches: Iterable[Any] | None = None,
        forward_fn: ForwardFn | None = None,
        method: Literal["batch", "sequential"] = "batch",
        until: float | None = None,
        layers: Layers | None = None,
    ) -> None:
        check_choice("when", when, ("fit_end", "validation"))
        self.num_batches, self.when, self.batches, self.forward_fn = num_batches, when, batches, forward_fn
        self.method, self.until, self.layers = method, until, layers

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate for a validation of a fit."""
        if self.when == "validation" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibrate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recalibrate the trained model."""
        if self.when == "fit_end":
            self._recalibrate(trainer, pl_module)

    def _recalibrate(self, trainer: Trainer, module: LightningModule) -> None:
        batches = self.batches if self.batches is not None else self._training_data(trainer)
        with trainer.precision_plugin.forward_context():
            recalibrate(
                module,
                batches,
                self.forward_fn,
                method=self.method,
                num_batches=self.num_batches,
                until=self.until,
                layers=self.layers,
            )

    def _training_data(self, trainer: Trainer) -> Iterable[Any]:
        loader: Any = trainer.train_dataloader
        if loader is None:
            raise InputError("expected training data to recalibrate with, got none: give batches=")
        restarts = getattr(loader, "persistent_workers", False) and getattr(loader, "num_workers", 0) > 0
        if restarts and self.when == "validation" and not trainer.is_last_batch:
            raise InputError(
                "expected batches= for a validation within an epoch, got a DataLoader with persistent_workers, which "
                "training is reading from: give another DataLoader"
            )
        found: Iterable[Any] = loader
        return found
