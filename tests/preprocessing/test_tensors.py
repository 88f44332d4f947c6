"""torch tensors and half precision: what is read, what comes back, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from batchnorm import DtypeError, InputError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener

ESTIMATORS = [MeanSubtractor(), StandardScaler(), MinMaxScaler(), Whitener("pca"), Whitener("zca")]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]


def images(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype == torch.bool else 100
    return torch.randint(0, high, (6, 3, 4, 5), generator=generator).to(dtype)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bfloat16, torch.float16])
def test_images_of_every_type(estimator: Any, dtype: torch.dtype) -> None:
    x = images(dtype)
    by_channel = clone(estimator).set_params(channel_axis=1).fit(x)
    expected = clone(by_channel).fit(x.double().numpy())
    y = by_channel.transform(x)
    assert y.dtype == (dtype if dtype.is_floating_point else torch.float32)
    eps = torch.finfo(y.dtype).eps
    np.testing.assert_allclose(
        y.double().numpy(), expected.transform(x.double().numpy()), rtol=eps, atol=eps if eps > 1e-6 else 1e-6
    )
    assert by_channel.n_samples_seen_ == (6 if isinstance(estimator, MinMaxScaler) else 120) or isinstance(
        estimator, MinMaxScaler
    )


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[::2, :, 1:, ::3],
        lambda x: x.flip(0).transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["channels_last", "transposed", "sliced", "channels outermost", "expanded"],
)
def test_any_strides(estimator: Any, view: Any) -> None:
    x = view(images(torch.int32).double())
    fitted = clone(estimator).set_params(channel_axis=1).fit(x)
    dense = clone(fitted).fit(x.contiguous())
    torch.testing.assert_close(fitted.transform(x), dense.transform(x.contiguous()), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(fitted.inverse_transform(fitted.transform(x)), x, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_no_gradient_flows_and_none_is_in_the_way(estimator: Any) -> None:
    x = torch.randn(9, 3, dtype=torch.float64)
    expected = clone(estimator).fit_transform(x)
    for given in (x.clone().requires_grad_(), torch.nn.Parameter(x.clone()), x.clone().requires_grad_() * 1):
        y = clone(estimator).fit(given, sample_weight=torch.ones(9, requires_grad=True)).transform(given)
        assert not y.requires_grad
        torch.testing.assert_close(y, expected)
        if "copy" in estimator.get_params():  # autograd would not know of a leaf written to
            assert clone(estimator).set_params(copy=False).fit(given).transform(given) is not given
    with torch.inference_mode():
        torch.testing.assert_close(clone(estimator).fit_transform(x * 1), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            torch.ones(3, 2, device="meta"),
            InputError,
            "X is on the meta device, where tensors hold no values: pass the",
        ),
        (
            torch.ones(3, 2).to(torch.float8_e5m2),
            DtypeError,
            "at least 16 bits or integers, got torch.float8_e5m2: pass",
        ),
        (torch.ones(3, 2) * 1j, DtypeError, "expected real numbers, got a tensor of torch.complex64"),
    ],
    ids=["meta", "float8", "complex"],
)
def test_refused(estimator: Any, x: torch.Tensor, error: type[Exception], text: str) -> None:
    fitted = clone(estimator).fit(torch.randn(5, 2))
    before = dict(vars(fitted))
    for call in (fitted.fit, fitted.partial_fit, fitted.transform, fitted.inverse_transform):
        with pytest.raises(error, match=text):
            call(x)
        assert vars(fitted) == before


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_what_float16_cannot_hold_is_refused(estimator: Any, make: Any) -> None:
    generator = np.random.default_rng(0)
    wide = generator.standard_normal((50, 2)) * [1, 3e4] + [0, 1e4]
    fitted = clone(estimator).fit(wide)
    small = make(np.array([[0.5, 0.25], [0.25, -0.5], [6e4, 6e4]], dtype=np.float16))
    before = np.asarray(small).copy()
    with pytest.raises(
        InputError, match=r"overflows float16, beyond 65504: row 2, column \d; transform the data as float32"
    ):
        fitted.inverse_transform(small)
    if "copy" in estimator.get_params():
        with pytest.raises(InputError, match="overflows float16"):
            fitted.set_params(copy=False).inverse_transform(small)
        np.testing.assert_array_equal(np.asarray(small), before)


def test_float16_that_fits_is_written_in_place() -> None:
    for make in (np.array, torch.tensor):
        x = make(np.arange(6, dtype=np.float16).reshape(3, 2))
        scaler = StandardScaler(copy=False).fit(x)
        expected = StandardScaler().fit_transform(x)
        assert scaler.transform(x) is x
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected))


def test_statistics_of_float16_are_those_of_its_values() -> None:
    x = np.full((70_000, 1), 60_000, dtype=np.float16)
    x[::2] = -60_000
    scaler = StandardScaler().fit(x)
    assert float(scaler.scale_[0]) == float(np.float16(60_000))
    assert abs(scaler.mean_[0]) <= 1e-16 * 60_000


def test_counts_beyond_the_integers_of_float32() -> None:
    rows = 2**24 + 1
    x = np.broadcast_to(np.ones((1, 1), dtype=np.uint8), (rows, 1))
    assert MinMaxScaler().fit(x).n_samples_seen_ == rows
    assert StandardScaler().fit(x).n_samples_seen_ == rows
