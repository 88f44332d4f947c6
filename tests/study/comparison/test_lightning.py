"""The callback, with a real Trainer on the CPU."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from study.comparison import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):
    """Without batch norm; logs an accuracy; its optimizer comes with a schedule."""

    def __init__(self, net=None) -> None:
        super().__init__()
        self.net = tiny.plain() if net is None else net

    def training_step(self, batch, batch_idx):  # noqa: ARG002
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch):
        x, y = batch
        output = self.net(x)
        self.log_dict({"val_acc": (output.argmax(1) == y).float().mean()})
        return nn.functional.cross_entropy(output, y)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=123.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(module, *callbacks, **options):
    torch.manual_seed(0)
    train, validation, test = tiny.loaders(8)
    train.generator = train.sampler.generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, train, validation if "test" not in options else [validation, test])


def callback(**options):
    from batchnorm.study.lightning import CompareCallback

    wanted = {"variants": ("none", "batch", "group"), "steps": 8, "lrs": [0.01, 0.1], "seeds": 2} | options
    return CompareCallback(**wanted)


@pytest.mark.parametrize("sanity", [0, 2])
def test_it_compares_and_the_module_trains_as_without_it(sanity, caplog):
    torch.manual_seed(1)
    alone = Module()
    torch.manual_seed(1)
    watched = Module()
    comparing = callback()
    fit(alone, num_sanity_val_steps=sanity)
    with caplog.at_level("INFO", "batchnorm.study"):
        fit(watched, comparing, num_sanity_val_steps=sanity)
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    found = comparing.comparison
    assert found.summary.complete
    assert set(found.rates().values()) <= {0.01, 0.1}
    assert [item.variant for item in found.verdict.judgements] == ["batch", "group"]
    assert found.verdict.text in caplog.text
    assert found.config.samples == (120, 24, 16)


def test_what_it_logs_can_be_compared():
    comparing = callback(monitor="val_acc", mode="max", reset=True, steps=40, lrs=[0.03])
    fit(Module(), comparing)
    found = comparing.comparison.records
    assert all(0 <= line["value"] <= 1 for line in found.where(metric="test"))
    starts = found.where(section="measure", variant="none", metric="validation", step=0)
    assert len({line["value"] for line in starts}) == 2


def test_a_module_with_batch_norms_loses_them_in_the_copies_alone():
    module = Module(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    fit(module, callback(lrs=[0.01]))
    assert type(module.net[1]) is nn.BatchNorm1d


def test_what_is_not_logged_is_said():
    with pytest.raises(bn.InputError, match="expected validation_step to log 'val_f1', it logs val_acc"):
        fit(Module(), callback(monitor="val_f1"))


def test_manual_optimization_is_refused():
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(bn.InputError, match="expected a module of automatic optimization"):
        fit(Manual(), callback())


def test_without_lightning_it_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "batchnorm.study.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(bn.MissingDependencyError, match=r"pip install 'batchnorm\[lightning\]'"):
        import batchnorm.study.lightning  # noqa: F401
