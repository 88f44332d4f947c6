"""The doctor on one process of several: it talks to nobody, so that each may look at as many batches as it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.probes.health import Subject
from batchnorm.probes.health.survey import Survey
from distributed.pair import on_both_ranks


@pytest.mark.parametrize("norm", [bn.nn.SyncBatchNorm, nn.SyncBatchNorm])
@on_both_ranks
def test_unequal_numbers_of_batches_wait_for_nobody(rank, norm):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.ReLU()).train()
    data = [torch.randn(24, 3) for _ in range(1 + 4 * rank)]
    survey = Survey.take(Subject(model, data))
    assert len(survey.sizes) == 1 + 4 * rank
    (seen,) = survey.layers
    with torch.no_grad():
        inputs = [model[0](x) for x in data]
        outputs = [torch.nn.functional.batch_norm(x, None, None, training=True) for x in inputs]
    torch.testing.assert_close(seen.trained.moments.mean, torch.cat(inputs).double().mean(0))
    spread = sum(float(y.double().square().sum()) for y in outputs)
    apart = sum(
        float((y - x / (1 + 1e-5) ** 0.5).double().square().sum()) for x, y in zip(inputs, outputs, strict=True)
    )
    assert seen.parting.distance == pytest.approx((apart / spread) ** 0.5, rel=1e-3)
    assert seen.parting.noise > 0
    assert model[1].training
    assert model[1].running_mean is not None
    assert int(model[1].num_batches_tracked) == 0


@on_both_ranks
def test_all_processes_together_are_the_batch_of_a_synchronised_layer(rank):
    model = nn.Sequential(nn.Linear(3, 4), bn.nn.SyncBatchNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    data = [torch.randn(8 + rank, 3) for _ in range(3)]
    found = bn.diagnose(model, data, select=["BN303"])
    assert [finding.layer for finding in found] == ["3"]
    assert found.findings[0].numbers["samples"] == 8 + rank
