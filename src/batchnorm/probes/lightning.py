"""Watching inside Lightning's Trainer. The only file of the probes that imports lightning."""

from __future__ import annotations

from typing import Any

from batchnorm._errors import MissingDependencyError
from batchnorm.probes.watching import Watch, watch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingDependencyError(
        "batchnorm.probes.lightning needs lightning, which is not installed: pip install lightning"
    ) from error


class WatchCallback(Callback):
    """Watches the module that a Trainer fits, and sends the scalars of each look to the Trainer's loggers.

    >>> callback = WatchCallback(every=20)                       # doctest: +SKIP
    >>> Trainer(callbacks=[callback]).fit(module, data)          # doctest: +SKIP
    >>> callback.watch.records                                   # doctest: +SKIP

    A step is Lightning's ``global_step``, that of the optimizer: with accumulated gradients the first batch of a step
    is what is looked at. All calls of layers in ``training_step`` count, whether they go through the module's
    ``forward`` or not. With several processes each watches its own batches; loggers write in the first one only.

    Args:
        every, layers, **options: as :func:`batchnorm.watch` takes them, except for ``modes`` and ``manual``.

    Attributes:
        watch: the watch, from the beginning of the fit on; its hooks are off when the fit has ended, also by an error.
    """

    def __init__(self, every: Any = 20, layers: Any = None, **options: Any) -> None:
        self._arguments = {"every": every, "layers": layers, **options, "manual": True}
        self.watch: Watch | None = None
        self._logged = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """The hooks go on before training; wrong arguments fail here and not after the first epoch."""
        if stage == "fit":
            self.watch, self._logged = watch(pl_module, **self._arguments), -1

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """A step begins."""
        if self.watch is not None:
            self.watch.step = trainer.global_step
            self.watch.begin_step(training=True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The step is over: what was seen in it is logged under its number."""
        if self.watch is None:
            return
        self.watch.end_step()
        last = self.watch.last_step
        if last is not None and last > self._logged:
            self._logged = last
            for logger in trainer.loggers if trainer.is_global_zero else ():
                logger.log_metrics(self.watch.scalars(), step=last)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Takes the hooks off."""
        if self.watch is not None:
            self.watch.remove()

    def on_exception(self, *_: Any) -> None:
        """Takes the hooks off."""
        if self.watch is not None:
            self.watch.remove()
