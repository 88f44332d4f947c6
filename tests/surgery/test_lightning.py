"""The callback in a real Trainer."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from surgery.population_samples import inputs

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging  # noqa: E402

from batchnorm.surgery.lightning import RecalibrateCallback  # noqa: E402


class Small(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.01), nn.ReLU(), nn.Linear(6, 2))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, _):
        self(batch[0])
        self.seen.append((self.net[1].running_mean.clone(), self.net[0](batch[0]).mean(0)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(n=50, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator) * 3 + 2
    return DataLoader(TensorDataset(x, (x[:, 0] > 2).long()), batch_size=16, **options)


@pytest.fixture
def trainer(tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def make(*callbacks, **options):
        defaults = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "default_root_dir": tmp_path,
        }
        return lightning.Trainer(callbacks=list(callbacks), **{**defaults, **options})

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(num_workers|does not have many workers|log_every_n_steps).*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield make


def population(module, loader):
    with torch.no_grad():
        return module.net[0](loader.dataset.tensors[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_at_the_end_of_a_fit(trainer, tmp_path, precision):
    module, loader = Small(), data(shuffle=True)
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(RecalibrateCallback(num_batches=None), saved, precision=precision).fit(module, loader)
    rows = population(module, loader)
    close = {"rtol": 1e-5, "atol": 1e-5} if precision == "32-true" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(module.net[1].running_mean, rows.mean(0), **close)
    torch.testing.assert_close(module.net[1].running_var, rows.var(0), **close)
    assert "the statistics of 4 batches" in str(bn.changes(module))


@pytest.mark.parametrize("method", ["batch", "sequential"])
def test_before_each_validation(trainer, method):
    module, loader = Small(), data()
    callback = RecalibrateCallback(when="validation", method=method)
    trainer(callback, num_sanity_val_steps=1).fit(module, loader, data())
    # The first is the sanity check, which comes before any step; each of 2 validations has 4 batches.
    assert len(module.seen) == 9
    assert torch.equal(module.seen[0][0], torch.zeros(6))
    rows = population(module, loader)
    torch.testing.assert_close(module.net[1].running_mean, rows.mean(0))
    sizes = torch.tensor([16.0, 16, 16, 2])
    for validation in (module.seen[1:5], module.seen[5:9]):
        weighted = sum(n * mean for n, (_, mean) in zip(sizes, validation, strict=True)) / 50
        torch.testing.assert_close(validation[0][0], weighted)
    assert module.training


def test_training_is_the_same_with_and_without(trainer):
    """It takes no random numbers: shuffling, and so the weights, do not change."""
    weights = []
    for callbacks in ([], [RecalibrateCallback(num_batches=2, when="validation")]):
        torch.manual_seed(0)
        module = Small()
        trainer(*callbacks, max_epochs=3).fit(module, data(shuffle=True), data())
        weights.append(module.net[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_other_batches_and_a_limit(trainer):
    module, other = Small(), torch.randn(60, 4)
    callback = RecalibrateCallback(2, batches=other.split(10), forward_fn=lambda m, b: m(b + 1), layers="net.1")
    trainer(callback).fit(module, data())
    rows = module.net[0](other[:20] + 1)
    torch.testing.assert_close(module.net[1].running_mean, rows.mean(0))
    assert module.net[1].num_batches_tracked == 2


def test_it_recalibrates_the_averaged_weights_behind_their_callback(trainer):
    module, loader = Small(), data()
    trainer(WeightAveraging(), RecalibrateCallback()).fit(module, loader)
    seen = torch.cat(inputs(module.eval(), lambda: module(loader.dataset.tensors[0]))["net.1"])
    torch.testing.assert_close(module.net[1].running_mean.double(), seen.mean(0), rtol=1e-5, atol=1e-5)


def test_workers_that_training_reads_from_are_not_restarted():
    class Loader:
        persistent_workers, num_workers = True, 1

    class Trainer:
        train_dataloader, is_last_batch = Loader(), False

    callback = RecalibrateCallback(when="validation")
    with pytest.raises(bn.InputError, match="expected batches= for a validation within an epoch"):
        callback._training_data(Trainer())
    Trainer.is_last_batch = True
    assert callback._training_data(Trainer()) is Trainer.train_dataloader
    Trainer.train_dataloader = None
    with pytest.raises(bn.InputError, match="expected training data to recalibrate with, got none: give batches="):
        callback._training_data(Trainer())


def test_another_time_is_refused():
    with pytest.raises(bn.InputError, match="when"):
        RecalibrateCallback(when="always")


def test_without_lightning_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "import batchnorm.surgery\n"
        "try:\n    import batchnorm.surgery.lightning\n"
        "except batchnorm.MissingDependencyError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'batchnorm[lightning]'" in found.stdout
