"""Quantizers and folders see a batch norm: what they make of ours is what they make of torch's."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm as bn

KINDS = {
    "BatchNorm2d": bn.nn.BatchNorm2d,
    "SyncBatchNorm": bn.nn.SyncBatchNorm,
    "GhostBatchNorm2d": lambda c: bn.nn.GhostBatchNorm2d(c, virtual_batch_size=16),
    "BatchRenorm2d": lambda c: bn.nn.BatchRenorm2d(c, r_max=1.0, d_max=0.0),
    "FrozenBatchNorm2d": bn.nn.FrozenBatchNorm2d,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
BATCH = ({0: torch.export.Dim("batch", min=2, max=16)},)


class Net(torch.nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3, bias=False), norm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


def pair(kind: str) -> tuple[Net, Net]:
    """The same net with torch's layer and with ours."""
    theirs = Net(torch.nn.BatchNorm2d)
    with torch.no_grad():
        for name, tensor in theirs.norm.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else -0.2))
    ours = Net(KINDS[kind])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def quantized(net: Net, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Through torchao's flow: the output while preparing, that of the integer model, and its operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own
        pytest.importorskip("torchao")
        from torchao.quantization.pt2e import move_exported_model_to_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=training))
        program = torch.export.export(net.train(training), (x,), dynamic_shapes=BATCH)
        prepared = (prepare_qat_pt2e if training else prepare_pt2e)(program.module(), quantizer)
        outputs = [prepared(scale * x) for scale in (1, 2, 3)]
        if training:
            move_exported_model_to_eval(prepared)
        converted = convert_pt2e(prepared)
        return torch.stack(outputs), converted(x), [str(node.target) for node in converted.graph.nodes]


@pytest.mark.parametrize("training", [True, False], ids=["qat", "ptq"])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "SyncBatchNorm", "GhostBatchNorm2d", "FrozenBatchNorm2d"])
def test_torchao_folds_ours_as_torchs(kind, training):
    if training and kind == "FrozenBatchNorm2d":
        pytest.skip("has no training form to fold")
    if training and os.environ.get("BATCHNORM_TEST_QAT") != "1":
        pytest.skip("takes a minute and a half; that the programs are the same is tested below")
    theirs, ours = pair(kind)
    x = torch.randn(4, 3, 8, 8)
    expected, found = quantized(theirs, x, training), quantized(ours, x, training)
    torch.testing.assert_close(found[:2], expected[:2])
    assert not any("batch_norm" in operator for operator in found[2])


@every_kind
def test_torchs_eager_folding_takes_ours(kind):
    theirs, ours = (net.eval() for net in pair(kind))
    x = torch.randn(4, 3, 8, 8)
    expected, found = (fuse_conv_bn_eval(net.conv, net.norm) for net in (theirs, ours))
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=0)
    torch.testing.assert_close(found(x), ours.norm(ours.conv(x)))


def test_torchs_eager_folding_after_a_linear_layer():
    linear, norm = torch.nn.Linear(3, 4).eval(), bn.nn.BatchNorm1d(4)
    norm(torch.randn(20, 4) * 3 + 1)
    x = torch.randn(5, 3)
    torch.testing.assert_close(fuse_linear_bn_eval(linear, norm.eval())(x), norm(linear(x)))


@pytest.mark.parametrize("kind", ["BatchNorm2d", "SyncBatchNorm", "GhostBatchNorm2d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_exported_program_is_that_of_torchs_layer(kind, training):
    theirs, ours = pair(kind)
    x = torch.randn(4, 3, 8, 8)
    graphs = []
    for net in (theirs, ours):
        program = torch.export.export(copy.deepcopy(net).train(training), (x,))
        graphs.append([(node.op, str(node.target), str(node.args)) for node in program.graph.nodes])
    assert graphs[0] == graphs[1]
