"""The operator batchnorm::affine: the C++ kernel and the reference against the formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from batchnorm import InputError
from batchnorm.preprocessing import MinMaxScaler, StandardScaler
from batchnorm.preprocessing.affine import reference

OPERATOR = "affine"
INF = float("inf")
SHAPES = [(5, 3), (300, 7), (40, 33), (100, 1), (1, 5), (0, 4), (20, 600), (6, 3, 5), (2, 3, 40_000), (4, 3, 0)]
LAYOUTS = {
    "dense": lambda x: x,
    "columns": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row": lambda x: x[:1].expand(x.shape),
}


def formula(x: Any, mean: Any, low: Any, scale: Any, inverse: bool, bounds: tuple[float, float]) -> Any:
    row = (1, -1, *[1] * (x.ndim - 2))
    mean, low, scale = (s.view(row) for s in (mean, low, scale))
    x = x.double()
    return (x - 0.25) * scale + low + mean if inverse else (((x - mean) - low) / scale + 0.25).clamp(*bounds)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("inverse", [False, True])
def test_kernel_and_reference_compute_the_formula(inverse: bool, layout: Any, dtype: torch.dtype) -> None:
    sets = torch.ops.batchnorm._instruction_sets().split()
    for shape in SHAPES:
        x = layout((torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype))
        mean, low, scale = torch.randn(3, shape[1], dtype=torch.float64)
        low, scale = low * 1e-17, scale.abs() + 0.5
        for value in (None, torch.nan, -INF):
            if value is not None and x.numel():
                x = x.clone()  # keeps the order in memory
                x[x.shape[0] // 2, -1] = value
            for bounds in ((-INF, INF), (-0.3, 1.0)):
                expected = formula(x, mean, low, scale, inverse, bounds).to(dtype)
                numbers = (mean, low, scale, 0.25, *bounds, inverse)
                eps = torch.finfo(dtype).eps
                for operator in (reference, torch.ops.batchnorm.affine):
                    for name in sets if operator is not reference else sets[:1]:
                        torch.ops.batchnorm._instruction_set(name)
                        out = torch.empty_like(x)
                        assert operator(x, *numbers, out) == bool(x.isinf().any())
                        torch.testing.assert_close(out, expected, rtol=2 * eps, atol=4e-16, equal_nan=True)
    torch.ops.batchnorm._instruction_set(sets[0])


@pytest.mark.usefixtures("kernel")
def test_into_itself_and_into_other_strides() -> None:
    x = torch.randn(200, 7)
    mean, low, scale = torch.randn(7).double(), torch.zeros(7).double(), torch.full((7,), 2.0).double()
    expected = ((x.double() - mean) / 2).float()
    for out in (torch.empty(7, 200).T, torch.empty(400, 14)[::2, ::2], x):
        assert not torch.ops.batchnorm.affine(x, mean, low, scale, 0.0, -INF, INF, False, out)
        torch.testing.assert_close(out, expected)
    with pytest.raises(RuntimeError, match="expected an output of x's shape and dtype"):
        torch.ops.batchnorm.affine(x, mean, low, scale, 0.0, -INF, INF, False, torch.empty(7, 200))


@pytest.mark.parametrize("scaler", [StandardScaler(), MinMaxScaler()], ids=str)
@pytest.mark.parametrize("copy", [True, False])
def test_infinity_is_refused_and_nothing_is_written(scaler: Any, copy: bool) -> None:
    x = np.random.default_rng(0).standard_normal((3000, 3)).astype(np.float32)
    fitted = scaler.set_params(copy=copy).fit(x)
    x[2000, 1] = np.inf
    before = x.copy()
    with pytest.raises(InputError, match="infinity: row 2000, column 1"):
        fitted.transform(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_both_orders_and_integers(order: Any, dtype: Any) -> None:
    x = np.asarray(np.random.default_rng(0).standard_normal((500, 5)) * 50 + 1000, dtype=dtype, order=order)
    y = StandardScaler().fit_transform(x)
    expected = (x - x.mean(0, dtype=float)) / x.std(0, dtype=float)
    np.testing.assert_allclose(y, expected, atol=2e-6 if dtype == np.float32 else 1e-13)
    assert y.flags.f_contiguous == (order == "F")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_result_has_its_own_memory_of_the_same_layout(dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](torch.ones(300, 700, dtype=dtype))
    out = torch.ops.batchnorm.result_like(x)
    like = torch.empty_like(x)
    assert (out.shape, out.dtype, out.stride()) == (like.shape, dtype, like.stride())
    assert out.data_ptr() != x.data_ptr()
    out.fill_(2)
    assert bool((x == 1).all())


def test_results_outlive_what_they_were_made_of_and_never_share_memory() -> None:
    generator = np.random.default_rng(0)
    scaler = StandardScaler().fit(generator.standard_normal((500, 300)))
    batches = [generator.standard_normal((500, 300)).astype(np.float32) for _ in range(4)]
    results = [scaler.transform(batch) for batch in batches]
    expected = [((batch - scaler.mean_) / scaler.scale_).astype(np.float32) for batch in batches]
    del scaler, batches
    for result, reference_result in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference_result, rtol=1e-6, atol=1e-7)
        assert result.flags.writeable
    again = np.array(results[0])
    results[1][:] = 0
    np.testing.assert_array_equal(results[0], again)
