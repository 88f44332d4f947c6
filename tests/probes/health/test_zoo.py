"""False alarms of the rules that need no data, on well-known architectures."""

from __future__ import annotations

import pytest
import torch

import batchnorm as bn
from oracles.model_zoo import ARCHITECTURES, image, timm_model, trained_like

QUICK = {
    *("resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_b0", "regnety_002", "levit_128s"),
    *("hrnet_w18_small", "repvgg_a0", "rexnet_100", "mobilevit_xxs", "visformer_tiny", "efficientformer_l1"),
}
BIASES = {"hrnet_w18_small": 4, "rexnet_100": 13, "visformer_tiny": 3, "efficientformer_l1": 33}
"""Convolutions with a bias before batch norm, which these models do have."""


def codes(model, **options):
    found = bn.diagnose(model, select=["BN0", "BN1", "BN2"], **options)
    return sorted((finding.code, finding.severity, finding.layer) for finding in found)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in QUICK], ids=lambda a: a.name)
def test_what_is_found_is_so(architecture):
    model, biases = timm_model(architecture.name), BIASES.get(architecture.name, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    in_train = codes(model.train(), optimizer=optimizer)
    assert [(code, severity) for code, severity, _ in in_train] == [("BN001", "info")] * biases
    assert codes(model.eval()) == [*in_train, ("BN201", "info", "")]  # it is new, and says so
    assert codes(model.train(), example=image(architecture), optimizer=optimizer) == in_train


@pytest.mark.parametrize("name", ["resnet18", "rexnet_100", "repvgg_a0"])
def test_trained_like_models(name):
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    model = trained_like(architecture)
    found = codes(model)
    assert [(code, severity) for code, severity, _ in found] == [("BN001", "info")] * BIASES.get(name, 0)
    assert codes(model, example=image(architecture)) == found
