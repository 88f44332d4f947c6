"""Every layer with what else PyTorch offers: export, dynamic shapes, states, devices, dtypes, parametrization."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize

import batchnorm as bn
from batchnorm.nn.whitening import _WhiteningLayer
from conformance.cases import CASES, Case
from conformance.test_layers import both_modes, every_case, made

BATCH = torch.export.Dim("batch", min=2, max=64)


def is_cut(case: Case, training: bool) -> bool:
    """Whether a batch is cut into ghosts, whose number is a part of an exported graph."""
    return training and case.layer.__name__.startswith("Ghost")


def longer(case: Case) -> torch.Tensor:
    return torch.randn(case.shape[0] + 3, *case.shape[1:])


@every_case
@both_modes
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exports_for_any_batch_without_our_operators(case, training, strict):
    layer = made(case, training)
    dynamic = None if is_cut(case, training) else ({0: BATCH},)
    example = torch.randn(case.shape)
    program = torch.export.export(copy.deepcopy(layer), (example,), dynamic_shapes=dynamic, strict=strict)
    x = example if dynamic is None else longer(case)
    for each in (program, program.run_decompositions()):
        assert [str(node.target) for node in each.graph.nodes if "batchnorm" in str(node.target)] == []
        runs, twin = copy.deepcopy(each.module()), copy.deepcopy(layer)
        torch.testing.assert_close(runs(x), twin(x))
        kept = dict(runs.named_buffers())  # those that the program needs
        torch.testing.assert_close(kept, {name: dict(twin.named_buffers())[name] for name in kept})


@every_case
@both_modes
def test_a_batch_of_another_size_recompiles_once(case, training):
    layer = made(case, training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=counter)
    for extra in range(6):
        x = torch.randn(case.shape[0] + extra, *case.shape[1:])
        torch.testing.assert_close(run(x), layer(x))
    # Ghosts: one graph more for batches that do not divide.
    assert counter.frame_count <= (3 if is_cut(case, training) else 2)
    torch._dynamo.reset()


# --- ONNX -------------------------------------------------------------------------------------------------------------


def onnx_of(layer: torch.nn.Module, x: torch.Tensor, *, dynamo: bool = True, **kwargs: Any) -> Any:
    """The ONNX model, and what onnxruntime makes of an input."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    buffer = io.BytesIO()
    if dynamo:
        kwargs["dynamic_shapes"] = ({0: BATCH},)
    else:
        kwargs["dynamic_axes"], kwargs["input_names"] = {"input": {0: "batch"}}, ["input"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torchvision, and of a deprecated exporter
        torch.onnx.export(layer, (x,), buffer, dynamo=dynamo, **({"verbose": False} if dynamo else {}), **kwargs)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    return onnx.load_from_string(buffer.getvalue()), run


SAMPLE_DEPENDENT = {"BatchNorm2d-policies"}  # inference_weight: no constant statistics
WHITENING = {name for name, case in CASES.items() if issubclass(case.layer, _WhiteningLayer)}
COMPLEX = {name for name in CASES if name.startswith("Complex")}
# ONNX has no eigenvalues. to_affine() is the way for these.
EIGENVALUES = {name for name in WHITENING if name.startswith("Decorrelated") or name.endswith("-whitening")}
ONE_NODE = CASES.keys() - SAMPLE_DEPENDENT - WHITENING - COMPLEX - {"WhitenedLinear"}
ACTIVATIONS = {"Relu", "Sigmoid", "Mul", "Gelu"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - EIGENVALUES))
def test_onnx(name):
    case = CASES[name]
    layer = made(case, False)
    model, run = onnx_of(layer, torch.randn(case.shape))
    x = longer(case)
    torch.testing.assert_close(run(x), layer(x), rtol=1e-5, atol=1e-5)
    kinds = [node.op_type for node in model.graph.node]
    if name in ONE_NODE:
        assert kinds[0] == "BatchNormalization"
        assert set(kinds[1:]) <= ACTIVATIONS


@pytest.mark.filterwarnings("ignore")  # all of it is deprecated
@pytest.mark.parametrize("name", sorted(CASES.keys() - WHITENING - COMPLEX))
def test_onnx_by_the_older_exporter(name):
    case = CASES[name]
    layer = made(case, False)
    # Inside a model: that exporter fails at keyword-only arguments of the outermost module.
    model, run = onnx_of(torch.nn.Sequential(layer).eval(), torch.randn(case.shape), dynamo=False)
    x = longer(case)
    torch.testing.assert_close(run(x), layer(x), rtol=1e-5, atol=1e-5)
    if name in ONE_NODE:
        assert [node.op_type for node in model.graph.node].count("BatchNormalization") == 1


@pytest.mark.parametrize("name", sorted(WHITENING))
def test_whitening_layers_as_plain_ones(name):
    case = CASES[name]
    layer = made(case, False)
    plain = layer.to_affine(len(case.shape) - 2)
    x = longer(case)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    model, run = onnx_of(plain, torch.randn(case.shape))
    torch.testing.assert_close(run(x), layer(x), rtol=1e-5, atol=1e-5)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[0] in ("Conv", "Gemm")
    assert set(kinds[1:]) <= ACTIVATIONS


# --- states, copies, devices ------------------------------------------------------------------------------------------


@every_case
def test_a_state_survives_files_and_copies_train_on(case):
    layer = made(case, True)
    layer(torch.randn(case.shape))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = case.make()
    loaded.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    x = torch.randn(case.shape)
    results = []
    for each in (layer, loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        y = each(x.clone().requires_grad_())
        y.square().sum().backward()
        results.append((y.detach(), each.state_dict(), [p.grad for p in each.parameters()]))
    assert len({result[0].sum().item() for result in results}) == 1
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


TORCH_KEYS = {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"}


def torch_twin(layer: torch.nn.Module) -> torch.nn.Module | None:
    """torch's layer with the same keys, where there is one."""
    if not layer.state_dict().keys() <= TORCH_KEYS:
        return None
    twin = torch.nn.BatchNorm1d(3, affine=layer.weight is not None)
    if twin.affine and layer.bias is None:
        twin.register_parameter("bias", None)
    return twin


@every_case
def test_states_go_to_torch_and_back(case):
    layer = made(case, False)
    twin = torch_twin(layer)
    if twin is None:
        assert case.layer.__name__.startswith(("Complex", "Decorrelated", "IterNorm", "NormOutside", "Whitened"))
        return
    twin.load_state_dict(layer.state_dict(), strict=True)
    back = case.make().eval()
    back.load_state_dict(twin.state_dict(), strict=True)
    torch.testing.assert_close(back.state_dict(), layer.state_dict(), rtol=0, atol=0)
    x = torch.randn(case.shape)
    torch.testing.assert_close(back(x), layer(x), rtol=0, atol=0)
    # States of version 1 have no num_batches_tracked, which counts from 0 then.
    old = {name: tensor for name, tensor in layer.state_dict().items() if name != "num_batches_tracked"}
    older = case.make()
    older.num_batches_tracked.fill_(0)
    older.load_state_dict(old, strict=True)
    assert older.num_batches_tracked == 0
    torch.testing.assert_close(older.running_var, layer.running_var, rtol=0, atol=0)


@every_case
@both_modes
def test_meta_device(case, training):
    layer = case.make(device="meta").train(training)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    for x in (torch.empty(case.shape, device="meta"), torch.empty(longer(case).shape, device="meta")):
        y = layer(x)
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    source = made(case, training)
    real = layer.to_empty(device="cpu")
    real.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(case.shape)
    torch.testing.assert_close(real(x), source(x), rtol=0, atol=0)


@every_case
def test_conversions_of_a_module(case):
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        layer = convert(made(case, True))
        dtype = next(t.dtype for t in layer.state_dict().values() if t.is_floating_point())
        y = layer(torch.randn(case.shape).to(dtype))
        assert y.dtype == dtype
        assert all(t.dtype == dtype for t in layer.state_dict().values() if t.is_floating_point())
        assert all(t.isfinite().all() for t in layer.state_dict().values())
    for memory_format in case.formats[1:]:
        layer, x = made(case, True), torch.randn(case.shape)
        twin = copy.deepcopy(layer).to(memory_format=memory_format)
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


# --- torch.func, autocast, parametrizations ---------------------------------------------------------------------------


@every_case
@both_modes
def test_state_in_state_out(case, training):
    layer = made(case, training)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    inputs = torch.randn(3, *case.shape)
    # Inputs that share a state, which is mapped over nothing.
    y, after = vmap(lambda x: bn.nn.functional.call_with_state(layer, parameters, buffers, x))(inputs)
    torch.testing.assert_close(buffers, before, rtol=0, atol=0)
    for i, x in enumerate(inputs):
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(y[i], twin(x))
        torch.testing.assert_close({name: b[i] for name, b in after.items()}, dict(twin.named_buffers()))


@every_case
def test_gradients_of_each_sample(case):
    layer = made(case, False)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(case.shape)

    def loss(parameters: Any, sample: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, parameters, (sample.unsqueeze(0),)).pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for name, found in each.items():
        expected = torch.stack([grad(loss)(parameters, sample)[name] for sample in x])
        torch.testing.assert_close(found, expected)


def autocast_agrees(case: Case, training: bool, dtype: torch.dtype, device: str) -> None:
    layer = made(case, training).to(device)
    peer = (torch.nn.Linear(3, 3) if case.layer is bn.nn.WhitenedLinear else torch.nn.BatchNorm1d(3)).to(device)
    for given in (torch.float32, dtype):
        x = torch.randn(case.shape, device=device).to(given).requires_grad_()
        twin = copy.deepcopy(layer)
        with torch.autocast(device, dtype=dtype):
            y = layer(x)
            assert y.dtype == peer(torch.randn(4, 3, device=device).to(given)).dtype
        y.float().square().sum().backward()
        assert x.grad.dtype == given
        wide = x.detach().float().requires_grad_()
        expected = twin(wide)
        expected.square().sum().backward()
        bound = 8 * torch.finfo(dtype if y.dtype == dtype or given == dtype else given).eps
        torch.testing.assert_close(y.float(), expected, rtol=bound, atol=bound)
        for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=20 * bound, atol=20 * bound)
        layer.zero_grad()


@every_case
@both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, training, dtype):
    autocast_agrees(case, training, dtype, "cpu")


@pytest.mark.cuda
@every_case
@both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_a_gpu(case, training, dtype, gpu):
    autocast_agrees(case, training, dtype, gpu)


@pytest.mark.cuda
@every_case
@both_modes
def test_on_a_gpu_as_on_the_cpu(case, training, gpu):
    here = made(case, training)
    there, x = copy.deepcopy(here).to(gpu), torch.randn(case.shape)
    ours, theirs = x.clone().requires_grad_(), x.to(gpu).requires_grad_()
    y, expected = there(theirs), here(ours)
    y.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(y.cpu(), expected)
    torch.testing.assert_close(theirs.grad.cpu(), ours.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close({k: v.cpu() for k, v in there.state_dict().items()}, here.state_dict())


class Doubled(torch.nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


@every_case
@both_modes
@pytest.mark.parametrize("kind", ["module", "weight_norm"])
def test_a_parametrized_weight(case, training, kind):
    layer = made(case, training)
    twin = copy.deepcopy(layer)
    inner, plain = (getattr(each, "layer", each) for each in (layer, twin))
    if inner.weight is None:
        pytest.skip("has no weight")
    if kind == "module":
        parametrize.register_parametrization(inner, "weight", Doubled())
        with torch.no_grad():
            plain.weight.mul_(2)
    elif not isinstance(inner.weight, torch.nn.Parameter):
        pytest.skip("torch's weight_norm is for parameters")
    else:
        parametrizations.weight_norm(inner)
    x = torch.randn(case.shape)
    y = layer(x)
    torch.testing.assert_close(y, twin(x))
    if any(parameter.requires_grad for parameter in layer.parameters()):
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(inner.running_mean, plain.running_mean)
