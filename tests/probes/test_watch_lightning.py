"""The callback, with a real Trainer on the CPU."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from probes.watched import mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):
    """A module whose training step does not go through its forward."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.net, self.fail_at = mlp(act=nn.ReLU), fail_at

    def training_step(self, batch, index):
        if index == self.fail_at:
            raise ZeroDivisionError
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Keeping(lightning.loggers.logger.DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("bn/") for name in metrics):
            self.seen[step] = metrics


def fit(module, callback=None, **options):
    torch.manual_seed(0)
    logger = Keeping()
    loader = torch.utils.data.DataLoader(torch.randn(48, 6), batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=logger,
            callbacks=[] if callback is None else [callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, loader)
    return logger


@pytest.mark.filterwarnings("ignore")
def test_a_fit_is_watched_and_the_same():
    torch.manual_seed(1)
    plain, watched = Module(), Module()
    watched.load_state_dict(plain.state_dict())
    callback = bn.probes.lightning.WatchCallback(every=4)
    fit(plain)
    logger = fit(watched, callback)
    for first, second in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    watch = callback.watch
    assert [record["step"] for record in watch.records] == [0, 0, 4, 4, 8, 8]
    assert watch.layers == ("net.1", "net.4")
    assert watch.latest("net.1")["grad_norm"] is not None
    assert logger.seen == {step: watch.scalars(step) for step in (0, 4, 8)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.modules())


@pytest.mark.filterwarnings("ignore")
def test_steps_are_those_of_the_optimizer():
    callback = bn.probes.lightning.WatchCallback(every=2, layers="net.1")
    fit(Module(), callback, accumulate_grad_batches=3)
    assert [record["step"] for record in callback.watch.records] == [0, 2]


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_fails_leaves_no_hooks():
    module, callback = Module(fail_at=4), bn.probes.lightning.WatchCallback(every=1)
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert [record["step"] for record in callback.watch.records] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_without_lightning(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "batchnorm.probes.lightning", raising=False)
    monkeypatch.delattr(bn.probes, "lightning", raising=False)
    with pytest.raises(
        bn.MissingDependencyError, match="needs lightning, which is not installed: pip install lightning"
    ):
        _ = bn.probes.lightning
