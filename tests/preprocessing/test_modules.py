"""to_module: the same numbers as transform, gradients, export, dtypes, devices' buffers."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

METHODS = ("pca", "zca", "cholesky", "pca-cor", "zca-cor")
ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(),
    StandardScaler(with_mean=False),
    StandardScaler(with_std=False),
    MinMaxScaler(),
    MinMaxScaler((0, 3), clip=True),
    *(Whitener(method) for method in METHODS),
    Whitener("pca", n_components=2),
]


def data(dtype: torch.dtype = torch.float32, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 7.0, 0.5]) + offset
    return (x + 0.4 * x.roll(1, 1)).to(dtype)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestModule:
    @pytest.mark.parametrize("offset", [0.0, 1e4])
    def test_equals_transform(self, estimator: Any, offset: float) -> None:
        x = data(offset=offset)
        fitted = clone(estimator).fit(x)
        exact = fitted.transform(x.double().numpy())
        scale = np.abs(exact).max()
        # Rounding of inputs is no excuse: they are float32 to begin with.
        y = fitted.to_module()(x)
        assert y.dtype == torch.float32
        np.testing.assert_allclose(y.numpy(), exact, rtol=0, atol=2e-6 * scale)
        wide = fitted.to_module(torch.float64)(x.double())
        np.testing.assert_allclose(wide.numpy(), exact, rtol=0, atol=1e-14 * scale * max(1, offset))
        after = fitted.to_module().double()(x.double())
        np.testing.assert_allclose(after.numpy(), exact, rtol=0, atol=1e-6 * scale)
        assert torch.equal(fitted.to_module().train()(x), fitted.to_module().eval()(x))

    def test_gradients(self, estimator: Any) -> None:
        x = data(torch.float64)[:5].requires_grad_()
        fitted = clone(estimator).set_params(**({"clip": False} if "clip" in estimator.get_params() else {})).fit(x)
        module = fitted.to_module(torch.float64)
        back = fitted.to_module(torch.float64, inverse=True)
        for each, value in ((module, x), (back, module(x).detach().requires_grad_())):
            assert torch.autograd.gradcheck(each.train(), (value,))
            (trained,) = torch.autograd.grad(each.train()(value).sin().sum(), value)
            (evaluated,) = torch.autograd.grad(each.eval()(value).sin().sum(), value)
            assert torch.equal(trained, evaluated)
            assert not list(each.parameters())

    @pytest.mark.parametrize("offset", [0.0, 1e4])
    def test_inverse(self, estimator: Any, offset: float) -> None:
        fitted = clone(estimator).fit(data(offset=offset))
        y = torch.from_numpy(fitted.transform(data(offset=offset).double().numpy())).float()
        exact = fitted.inverse_transform(y.double().numpy())
        x = fitted.to_module(inverse=True)(y)
        assert x.dtype == torch.float32
        np.testing.assert_allclose(x.numpy(), exact, rtol=3e-7, atol=3e-6)
        wide = fitted.to_module(torch.float64, inverse=True)(y.double())
        np.testing.assert_allclose(wide.numpy(), exact, rtol=1e-14, atol=1e-14)
        assert "inverse=True" in repr(fitted.to_module(inverse=True))

    @pytest.mark.parametrize("inverse", [False, True])
    def test_export_and_compile_a_free_batch(self, estimator: Any, inverse: bool) -> None:
        fitted = clone(estimator).fit(data())
        module = fitted.to_module(inverse=inverse)
        x = torch.from_numpy(fitted.transform(data().numpy())) if inverse else data()
        exported = torch.export.export(module, (x[:4],), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        assert torch.equal(exported.module()(x), module(x))
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(compiled(x), module(x))
        assert torch.equal(compiled(x), module(x))
        torch._dynamo.reset()

    def test_copies_and_precisions(self, estimator: Any) -> None:
        x = data(offset=1e6)
        module = clone(estimator).fit(x).to_module()
        expected = module(x)
        assert torch.equal(copy.deepcopy(module)(x), expected)
        assert torch.equal(module.to("cpu")(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(module(x), expected)
        # A narrower network leaves the statistics, a wider one widens them; the result follows the input.
        for narrow in (torch.float16, torch.bfloat16):
            module.to(narrow)
            assert torch.equal(module(x), expected)
            assert module(x.long()).dtype == narrow
        assert all(buffer.dtype == torch.float64 for buffer in copy.deepcopy(module).double().buffers())
        assert module.float()(x.long()).dtype == torch.float32

    def test_state_dict_carries_the_statistics(self, estimator: Any) -> None:
        x = data()
        module, other = clone(estimator).fit(x).to_module(), clone(estimator).fit(x * 3 + 1).to_module()
        assert not torch.equal(module(x), other(x)) or estimator.get_params().get("clip")
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(x), other(x))

    def test_width_is_checked(self, estimator: Any) -> None:
        module = clone(estimator).fit(data()).to_module()
        with pytest.raises(ShapeError, match=r"expected 3 features along axis -1, got shape \(5, 4\)"):
            module(torch.ones(5, 4))

    def test_not_fitted(self, estimator: Any) -> None:
        with pytest.raises(NotFittedError):
            clone(estimator).to_module()


def test_an_offset_of_1e8_loses_nothing_in_float32() -> None:
    x = (torch.randn(200, 2, dtype=torch.float64) * 100 + 1e8).float()  # steps of 8
    for estimator in (StandardScaler(), MinMaxScaler(), Whitener("zca")):
        fitted = estimator.fit(x)
        exact = fitted.transform(x.double())
        assert (fitted.to_module()(x) - exact).abs().max() < 3e-6
    high_only = (x - x.double().mean(0).float()) / x.double().std(0, correction=0).float()
    assert (high_only - StandardScaler().fit_transform(x.double())).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", [StandardScaler(), MinMaxScaler(), Whitener("zca")], ids=str)
def test_dtypes_of_input(estimator: Any, dtype: torch.dtype) -> None:
    x = data(offset=300).to(dtype)
    fitted = clone(estimator).fit(x.double())
    exact = fitted.transform(x.double().numpy())
    y = fitted.to_module()(x)
    assert y.dtype == dtype
    # One rounding of the result, and no more, whatever the precision of the input.
    error = np.abs(y.double().numpy() - exact) / np.maximum(1, np.abs(exact))
    assert error.max() <= max(torch.finfo(dtype).eps, 2e-6)
    back = fitted.to_module(inverse=True)(y)
    assert back.dtype == dtype
    exact = fitted.inverse_transform(y.double().numpy())
    assert (np.abs(back.double().numpy() - exact) <= np.maximum(torch.finfo(dtype).eps, 2e-7) * np.abs(exact)).all()


@pytest.mark.parametrize(
    "estimator",
    [StandardScaler(channel_axis=1), MinMaxScaler(channel_axis=1, clip=True), Whitener("zca", channel_axis=1)],
    ids=str,
)
def test_image_bytes(estimator: Any) -> None:
    image = torch.randint(0, 256, (10, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fitted = clone(estimator).fit(image)
    exact = fitted.transform(image.double().numpy())
    for module, dtype in ((fitted.to_module(), torch.float32), (fitted.to_module(torch.float16), torch.float16)):
        y = module(image)
        assert y.dtype == dtype
        np.testing.assert_allclose(y.double().numpy(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    network = torch.nn.Sequential(fitted.to_module(), torch.nn.Conv2d(3, 2, 3)).bfloat16()
    assert network(image).dtype == torch.bfloat16


def test_integers_beyond_float32() -> None:
    times = 1_700_000_000_000 + torch.randint(0, 1000, (50, 2), generator=torch.Generator().manual_seed(2))
    fitted = StandardScaler().fit(times)
    y = fitted.to_module()(times)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), fitted.transform(times.numpy()), rtol=0, atol=2e-5)
    assert fitted.to_module()(times > times.median()).dtype == torch.float32


def test_statistics_that_float32_cannot_hold() -> None:
    fitted = StandardScaler().fit(np.array([[1e200], [2e200]]) / 1e100)
    with pytest.raises(InputError, match=r"a statistic of 1\.5e\+100 is outside torch\.float32: pass dtype="):
        fitted.to_module()
    assert torch.equal(
        fitted.to_module(torch.float64)(torch.tensor([[1e100]], dtype=torch.float64)), torch.tensor([[-1.0]]).double()
    )


def test_types_that_make_no_sense() -> None:
    fitted = StandardScaler().fit(data())
    with pytest.raises(DtypeError, match=r"expected a floating dtype for the module, got torch\.int8"):
        fitted.to_module(torch.int8)
    with pytest.raises(DtypeError, match=r"expected real numbers, got torch\.complex64"):
        fitted.to_module()(data().to(torch.complex64))


def run_in_onnxruntime(module: torch.nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torchvision
        batch = ({0: torch.export.Dim("n", min=2)},)
        torch.onnx.export(module, (x[:3],), buffer, dynamo=True, verbose=False, dynamic_shapes=batch)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize(
    ("estimator", "inverse"),
    [
        (StandardScaler(), False),
        (MinMaxScaler((0, 3), clip=True), False),
        (Whitener("pca", n_components=2), False),
        (Whitener("zca"), True),
    ],
    ids=str,
)
def test_onnx_far_from_zero(estimator: Any, inverse: bool) -> None:
    x = data(offset=1e6)
    fitted = clone(estimator).fit(x)
    exact = fitted.transform(x.double().numpy())
    if inverse:
        x = torch.from_numpy(exact).float()
        exact = fitted.inverse_transform(x.double().numpy())
    run = run_in_onnxruntime(fitted.to_module(inverse=inverse), x)
    np.testing.assert_allclose(run(x), exact, rtol=6e-8 if inverse else 0, atol=2e-6)
    x[0, 0] = torch.nan
    np.testing.assert_array_equal(np.isnan(run(x)), fitted.to_module(inverse=inverse)(x).isnan().numpy())


def test_onnx_of_image_bytes() -> None:
    image = torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    fitted = Whitener(channel_axis=1).fit(image)
    exact = fitted.transform(image.double().numpy())
    np.testing.assert_allclose(run_in_onnxruntime(fitted.to_module(), image)(image), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "estimator", [StandardScaler(channel_axis=1), MinMaxScaler(channel_axis=1), Whitener(channel_axis=1)]
)
def test_images_and_nan(estimator: Any) -> None:
    x = torch.randn(6, 3, 4, 4) * 5 + 100
    module = clone(estimator).fit(x).to_module()
    np.testing.assert_allclose(module(x).numpy(), clone(estimator).fit(x).transform(x.double().numpy()), atol=2e-5)
    x[0, 0, 0, 0] = torch.nan
    assert torch.isnan(module(x)).sum() in (1, 3)
    network = torch.nn.Sequential(module, torch.nn.Conv2d(3, 2, 3))
    assert network(torch.randn(2, 3, 4, 4)).shape == (2, 2, 2, 2)


@pytest.mark.cuda
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_on_a_gpu_as_on_the_cpu(estimator: Any, gpu: str) -> None:
    x = data(offset=1e6)
    fitted = clone(estimator).fit(x)
    for inverse in (False, True):
        module = fitted.to_module(inverse=inverse)
        expected = module(x)
        with torch.autocast("cuda"):
            y = module.to(gpu)(x.to(gpu))
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.cpu(), expected, rtol=2e-6, atol=2e-6)
