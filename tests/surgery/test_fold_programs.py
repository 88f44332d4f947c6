"""Programs of torch.export in, and what else is made of a folded model: torch.compile, torch.export, ONNX."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from surgery.test_fold_algebra import learned

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
IMAGE = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with and without bias, grouped, transposed, a residual, a batch norm before a layer, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), learned(nn.BatchNorm2d(4, affine=False)), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), learned(bn.nn.BatchNorm2d(4)), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
        self.norm = learned(nn.BatchNorm2d(6))
        self.pre = learned(nn.BatchNorm2d(6))
        self.last = nn.Conv2d(6, 2, 1)
        self.head = nn.Sequential(nn.Linear(128, 5, bias=False), learned(nn.BatchNorm1d(5)))

    def forward(self, x):
        y = self.stem(x)
        y = self.norm(self.up(self.body(y) + y)).relu()
        return self.head(self.last(self.pre(y)).flatten(1))


def program(decomposed=False, **options):
    exported = torch.export.export(Net().eval(), (IMAGE,), **options)
    return exported.run_decompositions() if decomposed else exported


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_is_folded_saved_and_loaded(decomposed, tmp_path):
    given = program(decomposed)
    keys, code = list(given.state_dict), given.graph_module.code
    folded = bn.fold(given, strict=True)
    expected = given.module()(IMAGE)
    torch.testing.assert_close(folded.module()(IMAGE), expected, rtol=1e-4, atol=1e-4)
    assert not [node for node in folded.graph.nodes if "batch_norm" in str(node.target)]
    assert not [key for key in folded.state_dict if "running" in key or "tracked" in key]
    assert {"stem.0.bias", "up.bias", "head.0.bias"} <= set(folded.state_dict)
    assert (list(given.state_dict), given.graph_module.code) == (keys, code)
    torch.export.save(folded, tmp_path / "folded.pt2")
    loaded = torch.export.load(tmp_path / "folded.pt2")
    torch.testing.assert_close(loaded.module()(IMAGE), expected, rtol=1e-4, atol=1e-4)
    said = str(bn.changes(folded)).splitlines()
    assert len(said) == 5
    assert said[0].startswith("stem.1: ")
    assert said[-1].startswith("head.1: ")
    assert "folded into head.0" in said[-1]


def test_a_program_with_a_dynamic_batch():
    given = program(dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    folded = bn.fold(given, strict=True)
    x = torch.randn(7, 3, 9, 9)
    torch.testing.assert_close(folded.module()(x), given.module()(x), rtol=1e-4, atol=1e-4)


def test_a_folded_program_is_exported_and_folded_again():
    folded = bn.fold(program())
    assert str(bn.changes(bn.fold(folded, IMAGE))) == "the model: has no batch norm: nothing to fold"
    folded.run_decompositions()


def test_a_batch_norm_that_is_the_programs_output():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), learned(nn.BatchNorm2d(4))).eval()
    given = torch.export.export(model, (IMAGE,))
    folded = bn.fold(given, strict=True)
    torch.testing.assert_close(folded.module()(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)


def test_reasons_and_refusals_of_programs():
    shared = nn.Sequential(nn.ReLU(), learned(nn.BatchNorm2d(3)), nn.ReLU()).eval()
    folded = bn.fold(torch.export.export(shared, (IMAGE,)))
    assert "1: batch_norm left: its input comes from relu" in str(bn.changes(folded))
    conv = nn.Conv2d(3, 3, 1)
    tied = torch.export.export(nn.Sequential(conv, learned(nn.BatchNorm2d(3)), conv).eval(), (IMAGE,))
    assert "its parameters have other users" in str(bn.changes(bn.fold(tied)))
    training = torch.export.export(nn.Sequential(conv, nn.BatchNorm2d(3)).train(), (IMAGE,))
    with pytest.raises(bn.SurgeryError, match=r"a program of a model in eval mode, got batch_norm in training"):
        bn.fold(training)
    with pytest.raises(bn.SurgeryError, match="expected a program of a model in eval mode, got"):
        bn.fold(training.run_decompositions())
    without = nn.Sequential(conv, nn.BatchNorm2d(3, track_running_stats=False)).eval()
    for exported in (
        torch.export.export(without, (IMAGE,)),
        torch.export.export(without, (IMAGE,)).run_decompositions(),
    ):
        with pytest.raises(
            bn.SurgeryError, match=r"with running statistics, got .*batch_norm.* without, which normalizes"
        ):
            bn.fold(exported)
    broken = nn.Sequential(conv, nn.BatchNorm2d(3)).eval()
    broken[1].running_var[0] = -1
    with pytest.raises(bn.SurgeryError, match=r"running variances of 0 or more, got -1 in 1 \(batch_norm\)"):
        bn.fold(torch.export.export(broken, (IMAGE,)))


def test_a_folded_model_compiles_whole():
    model = Net().eval()
    folded = bn.fold(model, IMAGE, strict=True)
    run = torch.compile(folded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_folded_model_is_exported_without_batch_norms():
    model = Net().eval()
    exported = torch.export.export(bn.fold(model, IMAGE), (IMAGE,))
    assert not [node for node in exported.graph.nodes if "batch_norm" in str(node.target)]
    torch.testing.assert_close(exported.module()(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-4)


def test_onnx_of_a_folded_model_runs_equal():
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, buffer = Net().eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torchvision
        torch.onnx.export(bn.fold(model, IMAGE), (IMAGE,), buffer, dynamo=True, verbose=False)
    kinds = {node.op_type for node in onnx.load_from_string(buffer.getvalue()).graph.node}
    assert "BatchNormalization" not in kinds
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})[0])
    torch.testing.assert_close(found, model(IMAGE), rtol=1e-4, atol=1e-4)
