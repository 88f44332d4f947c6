"""BN302: train mode and eval mode that disagree, beyond the noise of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from batchnorm.probes.health import Subject, diagnose
from batchnorm.probes.health.survey import Survey
from oracles.digits import batches, convnet, digits, mlp, train


def disagree(model, data):
    return diagnose(model, data, select=["BN302"])


def test_a_lagging_average_disagrees_until_it_is_recalibrated():
    torch.manual_seed(0)
    model, data = train(mlp(lambda channels: nn.BatchNorm1d(channels, momentum=0.01)), 20), batches(60, 8)
    (finding,) = disagree(model, data)
    assert (finding.layer, finding.severity) == ("2", "warning")
    assert finding.numbers["distance"] > 0.6
    assert finding.numbers["noise"] < 0.25
    assert finding.numbers["flips"] > 2 * finding.numbers["flips_of_halves"]
    assert "BN301" in finding.remedy
    update_bn(data, model)
    assert not disagree(model.eval(), data)


def test_the_first_layer_that_parts_is_named():
    torch.manual_seed(0)
    model = train(mlp(), 200)
    model[5].running_mean += 2 * model[5].running_var.sqrt()
    (finding,) = disagree(model, batches(60, 8))
    assert finding.layer == "5"


@pytest.mark.parametrize(("make", "size", "rate"), [(mlp, 4, 0.01), (mlp, 32, 0.1), (convnet, 60, 0.1)])
def test_noise_is_not_a_disagreement_however_large(make, size, rate):
    torch.manual_seed(0)
    model = train(make(), 300, size, rate)
    data = batches(size, 8)
    survey = Survey.take(Subject(model, data))
    assert survey.outputs.distance > (0.5 if size == 4 else 0.05)
    assert survey.outputs.distance < 1.5 * survey.outputs.noise
    assert not disagree(model, data)


def test_halving_a_batch_disturbs_as_much_as_leaving_it():
    # Var(mean_half - mean) = sigma^2 (2/n - 1/n) = sigma^2 / n = Var(mean - mu).
    norm = nn.BatchNorm1d(2000)
    survey = Survey.take(Subject(nn.Sequential(norm), [torch.randn(16, 2000) for _ in range(20)]))
    assert survey.outputs.distance == pytest.approx(survey.outputs.noise, rel=0.1)


def test_sorted_batches_disagree_though_the_statistics_are_right():
    torch.manual_seed(0)
    model = train(mlp(), 200)
    images, labels, _, _ = digits()
    (finding,) = disagree(model, [images[labels == label][:60] for label in range(10)])
    assert "BN304" in finding.remedy


class Residual(nn.Module):
    """Three blocks of two convolutions, normalized before each."""

    def __init__(self, width=24):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        parts = lambda: (nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))  # noqa: E731
        self.blocks = nn.ModuleList(nn.Sequential(*parts(), *parts()) for _ in range(3))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).relu().mean((2, 3)))


def test_gaps_that_are_small_in_each_layer_add_up():
    torch.manual_seed(1)
    model, data = train(Residual(), 150, 32, 0.03, seed=1), batches(32, 16, seed=1)
    found = diagnose(model, data, select=["BN301", "BN302"])
    assert found.codes == {"BN302"}
    assert "bn.recalibrate" in found.findings[0].remedy
    images, labels = digits(1)[2:]
    before = float((model(images).argmax(1) == labels).double().mean())
    update_bn(data, model)
    assert not disagree(model.eval(), data)
    assert float((model(images).argmax(1) == labels).double().mean()) > before + 0.01


def test_untouched_statistics_and_tiny_batches_are_not_judged():
    assert not disagree(mlp(), batches(60, 4))
    assert not disagree(nn.Sequential(nn.BatchNorm2d(1)), [torch.randn(2, 1, 8, 8) + 9 for _ in range(4)])


def test_statistics_that_are_not_kept_cannot_disagree():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert not disagree(model, [torch.randn(32, 4) + 5 for _ in range(3)])
