"""to_module: the same numbers as transform, gradients, export, dtypes, devices' buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from batchnorm import ShapeError
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
        assert torch.autograd.gradcheck(module, (x,))
        assert not list(module.parameters())

    def test_export_and_compile_free_graph(self, estimator: Any) -> None:
        x = data()
        module = clone(estimator).fit(x).to_module()
        exported = torch.export.export(module, (x[:4],), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        assert torch.equal(exported.module()(x), module(x))

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


def test_dtypes_of_input() -> None:
    x = data()
    module = StandardScaler().fit(x).to_module()
    assert module(x.half()).dtype == torch.float16
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert module(x.double()).dtype == torch.float64
    image = torch.randint(0, 255, (10, 3), dtype=torch.uint8)
    fitted = StandardScaler().fit(image)
    np.testing.assert_allclose(fitted.to_module()(image).numpy(), fitted.transform(image.numpy()), atol=1e-6)


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
