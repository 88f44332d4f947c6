"""The rules about data on well-known architectures: they say what is true, once, and nothing else."""

from __future__ import annotations

import pytest
from torch.optim.swa_utils import update_bn

from batchnorm.probes.health import diagnose
from oracles.model_zoo import ARCHITECTURES, image, timm_model, trained_like

SOME = ("resnet18", "mobilenetv3_small_050", "efficientnet_b0", "levit_128s", "lcnet_050", "regnety_002")
QUICK = [architecture for architecture in ARCHITECTURES if architecture.name in SOME]


@pytest.mark.parametrize("architecture", QUICK, ids=lambda architecture: architecture.name)
def test_a_fresh_model_has_statistics_of_no_data_and_small_batches_are_small(architecture):
    found = diagnose(timm_model(architecture.name), [image(architecture, 8, seed) for seed in (1, 2)], select=["BN3"])
    assert [(finding.code, finding.severity) for finding in found] == [("BN301", "warning"), ("BN303", "warning")]
    assert found.of("BN301")[0].layer == ""
    assert f"{found.layers} of {found.layers} batch norms" in found.of("BN301")[0].message


@pytest.mark.parametrize(
    "architecture",
    [a for a in QUICK if a.name in ("mobilenetv3_small_050", "lcnet_050")],
    ids=lambda architecture: architecture.name,
)
def test_statistics_that_are_off_in_every_layer_are_found_until_they_are_recalibrated(architecture):
    # The oracle's are of two images, and moved by a tenth of a deviation: in depth that adds up.
    model = trained_like(architecture)
    data = [image(architecture, 16, seed) for seed in range(3)]
    assert diagnose(model, data, select=["BN3"]).codes >= {"BN301", "BN302"}
    update_bn(data, model)
    assert not diagnose(model.eval(), data, select=["BN3"])
