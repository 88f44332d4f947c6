"""Well-known architectures with trained-like statistics: how much is folded, and how exactly. All: the benchmark."""

from __future__ import annotations

import copy

import pytest
import torch

import batchnorm as bn
from oracles.model_zoo import ARCHITECTURES, image, trained_like

# (folded, of them): what is left has an activation in its batch norm, or a second reader before it.
EXPECTED = {
    "resnet18": (20, 20),
    "skresnet18": (36, 36),
    "mobilenetv3_small_050": (34, 34),
    "efficientnet_b0": (49, 49),
    "tinynet_e": (31, 31),
    "lcnet_050": (27, 27),
    "densenet121": (59, 121),
    "regnety_002": (44, 44),
    "ghostnet_050": (80, 80),
    "repvgg_a0": (44, 61),
    "ese_vovnet19b_dw": (23, 23),
    "cs3darknet_s": (32, 32),
    "mobilevit_xxs": (32, 32),
    "visformer_tiny": (28, 28),
    "fastvit_t8": (46, 70),
}


def off(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize(
    "architecture", [each for each in ARCHITECTURES if each.name in EXPECTED], ids=lambda each: each.name
)
@torch.no_grad()
def test_an_architecture(architecture):
    model, example, x = trained_like(architecture), image(architecture, seed=3), image(architecture, 2, seed=4)
    folded = bn.fold(model, example)
    done = [" folded into " in change.what for change in bn.changes(folded)]
    assert (sum(done), len(done)) == EXPECTED[architecture.name]
    y, found, exact = model(x), folded(x), copy.deepcopy(model).double()(x.double())
    assert off(found, y) <= 1e-4
    # No further from float64 than before: rounding differs either way.
    assert off(found, exact) <= max(4 * off(y, exact), 1e-5)
