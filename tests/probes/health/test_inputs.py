"""BN308: data that were never normalized."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import batchnorm as bn
from batchnorm.probes.health import diagnose
from oracles.digits import batches, convnet, mlp


def found(model, data, **options):
    return list(diagnose(model, data, select=["BN308"], **options))


def head(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_raw_features_are_seen_and_a_front_ends_that():
    raw = torch.tensor(load_breast_cancer().data, dtype=torch.float32)
    data = list(raw.split(64))
    (finding,) = found(head(30), data)
    assert (finding.layer, finding.severity) == ("0", "warning")
    rms = raw.double().square().mean(0).sqrt()
    assert finding.numbers["largest_rms"] == pytest.approx(float(rms.max()), rel=1e-6)
    assert f"{int((rms > 10).sum())} of 30 features are large" in finding.message
    front = bn.preprocessing.StandardScaler().fit(raw).to_module()
    assert not found(nn.Sequential(front, head(30)), data)
    assert not found(nn.Sequential(nn.BatchNorm1d(30), head(30)), data)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.randn(64, 4) * 11, "are large"),
        (lambda: torch.randn(64, 4) * 8, None),
        (lambda: torch.randn(64, 4) * 0.1 + 3, "have means of more than 10 deviations"),
        (lambda: torch.randn(64, 4) * 0.5 + 3, None),
        (lambda: torch.randn(64, 4) * 0.001, "has a standard deviation of"),
        (lambda: torch.randn(64, 4) * torch.tensor([0.01, 0.01, 0.01, 5]), "times as wide as the median"),
        (lambda: torch.randn(64, 4) * torch.tensor([0.2, 0.1, 1, 5]), None),
        (lambda: torch.nn.functional.one_hot(torch.randint(4, (64,)), 4).float(), None),
        (lambda: torch.full((64, 4), 3.0), None),
        (lambda: torch.rand(64, 4), None),
    ],
)
def test_tables(make, reason):
    findings = found(head(4), [make() for _ in range(3)])
    assert len(findings) == (reason is not None)
    if reason:
        assert reason in findings[0].message


@pytest.mark.parametrize(
    ("make", "raw"),
    [
        (lambda: torch.randint(256, (8, 3, 9, 9)).float(), True),
        (lambda: torch.rand(8, 3, 9, 9), False),
        (lambda: torch.randn(8, 3, 9, 9), False),
        (lambda: torch.randn(8, 3, 9, 9) * 15 - 40, False),  # decibels
        (lambda: torch.randn(8, 3, 9, 9) * 500 - 200, True),
        (lambda: torch.randn(8, 3, 9, 9) + 60, True),
    ],
)
def test_images_and_signals(make, raw):
    assert bool(found(conv(), [make() for _ in range(3)])) == raw


def test_what_the_forward_does_first_counts():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv()

        def forward(self, images):
            return self.body(images.float() / 255)

    assert not found(Scaling(), [torch.randint(256, (8, 3, 9, 9), dtype=torch.uint8) for _ in range(3)])


def test_tokens_are_not_judged():
    model = nn.Sequential(nn.Embedding(1000, 6), nn.Flatten(), nn.Linear(60, 4), nn.BatchNorm1d(4))
    assert not found(model, [torch.randint(1000, (32, 10)) for _ in range(3)])


@pytest.mark.parametrize("make", [mlp, convnet])
def test_digits_in_zero_to_one_are_well(make):
    assert not found(make(), batches(60, 4))


def test_recurrent_layers_are_judged_by_features():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.norm = nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.rnn(x)[0][:, -1])

    data = [torch.randn(16, 5, 3) * torch.tensor([1.0, 1.0, 300.0]) for _ in range(3)]
    (finding,) = found(Recurrent(), data)
    assert finding.layer == "rnn"
    assert "1 of 3 features are large" in finding.message
