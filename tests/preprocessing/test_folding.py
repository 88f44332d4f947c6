"""fold_into: one layer instead of two, equal wherever algebra allows it and refused elsewhere."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from batchnorm import DtypeError, InputError, ShapeError
from batchnorm.preprocessing import MeanSubtractor, MinMaxScaler, StandardScaler, Whitener, folding

C = 4
ESTIMATORS = [
    MeanSubtractor(),
    StandardScaler(),
    StandardScaler(with_mean=False),
    StandardScaler(with_std=False),
    StandardScaler(with_mean=False, with_std=False),
    MinMaxScaler(),
    MinMaxScaler((0, 3)),
    *(Whitener(method) for method in ("pca", "zca", "cholesky", "pca-cor", "zca-cor")),
    Whitener("pca", n_components=2),
    Whitener("zca", n_components=2, shrinkage=0.1, eps=0.01),
]
WITHOUT_SHIFT = [StandardScaler(with_mean=False), StandardScaler(with_mean=False, with_std=False)]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# What the layer's own arithmetic may lose, against float64, with data two deviations from zero.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.08, torch.float16: 0.01}


def data(spatial: tuple[int, ...] = (), offset: float = 2.0, seed: int = 0, rows: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, C, *spatial, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.0, 7.0, 0.5, 2.0], dtype=torch.float64).view(C, *[1] * len(spatial)) + offset
    return x + 0.4 * x.roll(1, 1)


def width(fitted: Any) -> int:
    return fitted.n_components_ if isinstance(fitted, Whitener) and not fitted.method.startswith("zca") else C


def assert_folded(fitted: Any, layer: Any, x: torch.Tensor, tolerance: float | None = None) -> Any:
    """The new layer does in its own dtype what the two do in float64."""
    before = copy.deepcopy(layer.state_dict())
    folded = fitted.fold_into(layer, tolerance=tolerance)
    dtype = layer.weight.dtype
    assert type(folded) is type(layer)
    assert folded.weight.dtype == dtype
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    x = x.to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(torch.from_numpy(fitted.transform(x.double().numpy())))
        y = folded(x)
    assert y.dtype == dtype
    assert y.shape == exact.shape
    error = float((y.double() - exact).abs().max() / exact.abs().max())
    assert error <= (TOLERANCE[dtype] if tolerance is None else tolerance)
    return folded


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
class TestEveryEstimator:
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear(self, estimator: Any, dtype: torch.dtype, bias: bool) -> None:
        fitted = clone(estimator).fit(data())
        layer = nn.Linear(width(fitted), 5, bias=bias, dtype=dtype)
        folded = assert_folded(fitted, layer, data(seed=1))
        assert folded.in_features == C
        assert (folded.bias is None) == (not bias and not any(fitted.transform(np.zeros((1, C)))[0]))

    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
    def test_convolution(self, estimator: Any, dtype: torch.dtype, dims: int, mode: str) -> None:
        spatial = (6, 5, 4)[:dims]
        fitted = clone(estimator).set_params(channel_axis=1).fit(data(spatial))
        padding = 0 if mode == "zeros" else 1
        layer = CONVS[dims](width(fitted), 6, 3, padding=padding, padding_mode=mode, dtype=dtype)
        assert assert_folded(fitted, layer, data(spatial, seed=1)).in_channels == C

    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_transposed_convolution(self, estimator: Any, dtype: torch.dtype, dims: int) -> None:
        spatial = (6, 5, 4)[:dims]
        fitted = clone(estimator).set_params(channel_axis=1).fit(data(spatial))
        layer = TRANSPOSED[dims](width(fitted), 6, 3, padding=2, dtype=dtype)
        assert assert_folded(fitted, layer, data(spatial, seed=1)).in_channels == C


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", WITHOUT_SHIFT, ids=str)
def test_zeros_stay_zeros_without_a_shift(estimator: Any, dtype: torch.dtype) -> None:
    fitted = clone(estimator).set_params(channel_axis=1).fit(data((6, 5)))
    for layer in (
        nn.Conv2d(C, 6, 3, padding=1, groups=2, bias=False, dtype=dtype),
        nn.Conv2d(C, 6, 3, padding="same", dtype=dtype),
        nn.ConvTranspose2d(C, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dtype=dtype),
        nn.ConvTranspose2d(C, 6, 2, bias=False, dtype=dtype),
    ):
        folded = assert_folded(fitted, layer, data((6, 5), seed=1))
        assert (folded.bias is None) == (layer.bias is None)
        assert folded.bias is None or torch.equal(folded.bias, layer.bias)


@settings(max_examples=60)
@given(
    estimator=st.sampled_from(ESTIMATORS),
    transposed=st.booleans(),
    sizes=st.lists(
        st.tuples(*(st.integers(1, high) for high in (3, 2, 2)), st.integers(0, 4), st.integers(0, 1)),
        min_size=1,
        max_size=3,
    ),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 5),
)
def test_random_convolutions(
    estimator: Any, transposed: bool, sizes: list[Any], mode: str, groups: int, bias: bool, seed: int
) -> None:
    """Folded they are equal in float64 at every position; and what is refused is indeed no convolution."""
    spatial = (7, 6, 5)[: len(sizes)]
    taps, stride, dilation, padding, extra = (tuple(column) for column in zip(*sizes, strict=True))
    fitted = clone(estimator).set_params(channel_axis=1).fit(data(spatial))
    assume(groups == 1 or not isinstance(estimator, Whitener))
    channels = width(fitted)
    if transposed:
        assume(all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)))
        assume(
            all(
                (n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0
                for n, s, p, d, k, e in zip(spatial, stride, padding, dilation, taps, extra, strict=True)
            )
        )
        layer: Any = TRANSPOSED[len(sizes)](
            channels, 4, taps, stride, padding, extra, groups, bias, dilation, dtype=torch.float64
        )
    else:
        layer = CONVS[len(sizes)](channels, 4, taps, stride, padding, dilation, groups, bias, mode, dtype=torch.float64)
    x = data(spatial, seed=seed + 1)
    if moves_zero(fitted) and not takes_a_constant(layer, spatial):
        with pytest.raises(InputError, match="cannot take up a shift"):
            fitted.fold_into(layer)
    else:
        folded = assert_folded(fitted, layer, x)
        assert [folded.stride, folded.dilation, folded.groups] == [layer.stride, layer.dilation, layer.groups]


def moves_zero(fitted: Any) -> bool:
    return bool(fitted.transform(np.zeros((1, C, 1))).any())


def takes_a_constant(layer: Any, spatial: tuple[int, ...]) -> bool:
    """Whether a constant, for random weights, comes out as a constant: of a large input, to see the borders too."""
    with torch.no_grad():
        layer = copy.deepcopy(layer)
        layer.weight.copy_(torch.rand_like(layer.weight) + 1)
        y = layer(torch.ones(1, layer.in_channels, *(3 * n + 8 for n in spatial), dtype=torch.float64)).flatten(2)
    return bool((y.amax(2) - y.amin(2) < 1e-9).all())


def test_exactly_in_fractions() -> None:
    """Statistics and weights in binary fractions: nothing is rounded, and nothing may differ."""
    scaler = StandardScaler().fit(np.array([[2.0, -4.0], [6.0, 4.0]]))  # means 4 and 0, deviations 2 and 4
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -5.0]]))
        layer.bias.copy_(torch.tensor([0.25]))
    folded = scaler.fold_into(layer)
    weight = [Fraction(3) / 2, Fraction(-5) / 4]
    bias = Fraction(1, 4) - weight[0] * 4
    assert [Fraction(w) for w in folded.weight[0].tolist()] == weight
    assert Fraction(folded.bias.item()) == bias
    minmax = MinMaxScaler((-1, 3)).fit(np.array([[1.0, 0.0], [3.0, 8.0]]))  # y = 2 (x - 1) - 1 and x / 2 - 1
    folded = minmax.fold_into(layer)
    assert folded.weight.tolist() == [[6.0, -2.5]]
    assert Fraction(folded.bias.item()) == Fraction(1, 4) + 3 * -3 + -5 * -1


def test_the_new_layer_is_trained_on_as_the_old_one() -> None:
    scaler = StandardScaler(channel_axis=1).fit(data((6, 6)))
    layer = nn.Conv2d(C, 8, 3, bias=False).to(memory_format=torch.channels_last).eval()
    layer.note = "kept"  # type: ignore[assignment]
    folded = scaler.fold_into(layer)
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.training
    assert folded.note == "kept"
    assert folded.bias.requires_grad
    folded(data((6, 6)).float()).sum().backward()
    assert folded.weight.grad is not None
    assert layer.weight.grad is None
    layer.requires_grad_(False)
    assert [p.requires_grad for p in scaler.fold_into(layer).parameters()] == [False, False]
    linear = nn.Linear(C, 2)
    linear.bias.requires_grad_(False)
    folded = StandardScaler().fit(data()).fold_into(linear)
    assert (folded.weight.requires_grad, folded.bias.requires_grad) == (True, False)


def test_subclasses_that_compute_the_same() -> None:
    class Named(nn.Linear):
        def __init__(self, name: str) -> None:
            super().__init__(C, 3)
            self.name = name

    folded = assert_folded(StandardScaler().fit(data()), Named("head"), data(seed=1))
    assert folded.name == "head"
    assert_folded(StandardScaler().fit(data()), nn.MultiheadAttention(C, 1).out_proj, data(seed=1))


def test_the_last_axis_and_negative_axes() -> None:
    x = data().reshape(10, 4, C)
    fitted = StandardScaler(channel_axis=-1).fit(x)
    layer = nn.Linear(C, 2)
    expected = layer(fitted.to_module()(x.float()))
    torch.testing.assert_close(fitted.fold_into(layer)(x.float()), expected, rtol=1e-4, atol=1e-5)
    images = StandardScaler(channel_axis=-3).fit(data((5, 5)))
    assert_folded(images, nn.Conv2d(C, 2, 3), data((5, 5)))


def test_random_numbers_of_the_program_are_left_alone() -> None:
    fitted = Whitener().fit(data())
    layer = nn.Linear(C, 2)
    state = torch.random.get_rng_state()
    fitted.fold_into(layer)
    assert torch.equal(torch.random.get_rng_state(), state)


class TestAccuracy:
    def test_data_far_from_zero_are_refused_with_the_numbers(self) -> None:
        x = data(offset=1e6)
        text = (
            r"^folding loses accuracy: the new Linear would be off by 0\.[\d]+ of its largest output in torch\.float32"
            r", more than the tolerance of 0\.00035, as the data lie up to 1\.\de\+06 deviations from zero: keep to_mod"
        )
        for estimator in ESTIMATORS:
            fitted = clone(estimator).fit(x)
            if bool(fitted.transform(np.zeros((1, C))).any()):
                with pytest.raises(InputError, match=r"folding loses accuracy"):
                    fitted.fold_into(nn.Linear(width(fitted), 5))
        fitted = StandardScaler().fit(x)
        with pytest.raises(InputError, match=text) as caught:
            fitted.fold_into(nn.Linear(C, 5))
        assert "\n" not in str(caught.value)

    def test_the_error_that_is_told_is_that_of_real_data(self) -> None:
        for offset, layer in itertools.product((1e2, 1e4, 1e6), (nn.Linear(C, 5), nn.Linear(C, 5).double())):
            x = data(offset=offset, rows=500)
            fitted = StandardScaler().fit(x)
            x = x.to(layer.weight.dtype)
            exact = copy.deepcopy(layer).double()(torch.from_numpy(fitted.transform(x.double().numpy())))
            y = fitted.fold_into(layer, tolerance=1e9)(x).double()
            real = float(((y - exact).detach().abs().amax(0) / exact.abs().amax(0).detach()).max())
            with pytest.raises(InputError, match=r"would be off by") as caught:
                fitted.fold_into(layer, tolerance=0)
            told = float(str(caught.value).partition("off by ")[2].partition(" ")[0])
            assert told / 4 <= real <= told * 4
            fitted.fold_into(layer, tolerance=told * 1.1)

    def test_a_float64_layer_folds_what_float32_loses(self) -> None:
        x = data(offset=1e4)
        assert_folded(StandardScaler().fit(x), nn.Linear(C, 5).double(), x, tolerance=1e-10)

    def test_a_number_beyond_float16(self) -> None:
        with pytest.raises(InputError, match=r"off by inf of its largest output in torch\.float16"):
            StandardScaler().fit(data() * 1e-8).fold_into(nn.Linear(C, 5).half(), tolerance=1e30)

    def test_a_wrong_algebra_would_be_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        correct = folding._folded

        def wrong(*args: Any) -> Any:
            layer = correct(*args)
            layer.weight.data[0] *= 1.01
            return layer

        monkeypatch.setattr(folding, "_folded", wrong)
        for estimator in ESTIMATORS:
            fitted = clone(estimator).fit(data())
            with pytest.raises(InputError, match="folding loses accuracy"):
                fitted.fold_into(nn.Linear(width(fitted), 5))

    def test_constant_features(self) -> None:
        x = data()
        x[:, 2] = 3
        for estimator in ESTIMATORS:
            fitted = clone(estimator).fit(x)
            if isinstance(fitted, Whitener) and fitted.whitening_.shape[0] < C:
                assert fitted.fold_into(nn.Linear(fitted.whitening_.shape[0], 5)).in_features == C
            else:
                assert_folded(fitted, nn.Linear(C, 5), x)
        depthwise = StandardScaler(channel_axis=1).fit(x.unsqueeze(-1)).fold_into(nn.Conv1d(C, C, 1, groups=C))
        assert depthwise(x.float().unsqueeze(-1)).isfinite().all()

    @pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf"), "much"])
    def test_a_tolerance_that_makes_no_sense(self, tolerance: Any) -> None:
        with pytest.raises(InputError, match="tolerance must be None or a finite number and not negative, got"):
            StandardScaler().fit(data()).fold_into(nn.Linear(C, 2), tolerance=tolerance)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def with_hook() -> nn.Module:
    layer = nn.Linear(C, 2)
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(C, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def bits() -> nn.Module:
    layer = nn.Linear(C, 2)
    layer.weight = nn.Parameter(torch.zeros(2, C, dtype=torch.int8), requires_grad=False)
    return layer


FLAT, IMAGES = {}, {"channel_axis": 1}
PADDED = (
    r"cannot take up a shift, its padding adds zeros after normalization: keep to_module\(\) in front, or train with"
)
BORDERS = (
    r"cannot take up a shift, a transposed convolution's borders get fewer taps after normalization: keep to_module"
)


@pytest.mark.parametrize(
    ("axis", "layer", "error", "text"),
    [
        (
            FLAT,
            lambda: nn.ReLU(),
            DtypeError,
            r"expected a Linear, Conv or ConvTranspose layer of torch\.nn.* got ReLU",
        ),
        (FLAT, lambda: nn.Bilinear(C, C, 2), DtypeError, "to fold into, got Bilinear"),
        (FLAT, lambda: "layer", DtypeError, "to fold into, got str"),
        (FLAT, lambda: nn.Linear(5, 2), ShapeError, "StandardScaler gives 4 features, but Linear is expecting 5"),
        (IMAGES, lambda: nn.Conv2d(3, 2, 1), ShapeError, "StandardScaler gives 4 features, but Conv2d is expecting 3"),
        (IMAGES, lambda: nn.Conv2d(8, 2, 1, groups=2), ShapeError, "gives 4 features, but Conv2d is expecting 8"),
        (
            IMAGES,
            lambda: nn.Linear(C, 2),
            InputError,
            "Linear reads the last axis, but the StandardScaler has channel_axis=1",
        ),
        (FLAT, lambda: nn.Conv2d(C, 2, 1), InputError, "Conv2d reads channels along axis 1, but .* channel_axis=None"),
        ({"channel_axis": -1}, lambda: nn.Conv1d(C, 2, 1), InputError, "Conv1d reads channels along axis 1, but"),
        (IMAGES, lambda: nn.Conv2d(C, 2, 3, padding=1), InputError, "Conv2d " + PADDED),
        (IMAGES, lambda: nn.Conv1d(C, 2, 3, padding="same"), InputError, "Conv1d " + PADDED),
        (IMAGES, lambda: nn.ConvTranspose2d(C, 2, 3), InputError, "ConvTranspose2d " + BORDERS),
        (IMAGES, lambda: nn.ConvTranspose2d(C, 2, 2, stride=2), InputError, "ConvTranspose2d " + BORDERS),
        (IMAGES, lambda: nn.ConvTranspose1d(C, 2, 2, padding=1, output_padding=1, dilation=2), InputError, BORDERS),
        (FLAT, lambda: nn.LazyLinear(2), InputError, "LazyLinear has no weight yet: run a batch through it first"),
        (FLAT, lambda: nn.Linear(C, 2, device="meta"), InputError, "Linear is on the meta device, without numbers"),
        (FLAT, lambda: Doubled(C, 2), DtypeError, "Doubled has a forward of its own, so that its algebra is unknown"),
        (FLAT, patched, DtypeError, "Linear has a forward of its own, so that its algebra is unknown: fold by hand"),
        (FLAT, with_hook, InputError, "Linear has forward hooks, which would see other numbers: remove them first"),
        (FLAT, bits, DtypeError, r"plain parameters of a floating dtype, got Tensor of torch\.int8: fold before"),
        (
            FLAT,
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(C, 2)),
            InputError,
            "ParametrizedLinear is parametrized: .*remove_parametrizations",
        ),
    ],
)
def test_refusals(axis: dict[str, Any], layer: Any, error: type[Exception], text: str) -> None:
    x = data((5,)) if axis == {"channel_axis": 1} else data()
    fitted = StandardScaler(**axis).fit(x)
    with pytest.raises(error, match=text) as caught:
        fitted.fold_into(layer())
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:StandardScaler saw only NaN:RuntimeWarning")
def test_refusals_of_the_estimator() -> None:
    with pytest.raises(
        InputError, match=r"clipping is not linear: keep to_module\(\) in front, or fit with clip=False"
    ):
        MinMaxScaler(clip=True).fit(data()).fold_into(nn.Linear(C, 2))
    with pytest.raises(InputError, match=r"Whitener mixes all features, but Conv1d has groups=2: keep to_module\(\)"):
        Whitener(channel_axis=1).fit(data((5,))).fold_into(nn.Conv1d(C, 2, 1, groups=2))
    with pytest.raises(ShapeError, match="Whitener gives 2 features, but Linear is expecting 4"):
        Whitener(n_components=2).fit(data()).fold_into(nn.Linear(C, 2))
    x = data()
    x[:, 1] = torch.nan
    with pytest.raises(InputError, match="StandardScaler saw only NaN in feature 1: drop it before folding"):
        StandardScaler().fit(x).fold_into(nn.Linear(C, 2))
    for estimator in ESTIMATORS:
        with pytest.raises(NotFittedError):
            clone(estimator).fold_into(nn.Linear(C, 2))


@pytest.mark.cuda
def test_a_layer_on_a_gpu(gpu: str) -> None:
    for layer, spatial in ((nn.Linear(C, 2, bias=False), ()), (nn.Conv2d(C, 2, 3), (6, 5))):
        fitted = StandardScaler(channel_axis=1 if spatial else None).fit(data(spatial))
        expected = fitted.fold_into(layer)
        folded = fitted.fold_into(layer.to(gpu))
        assert all(parameter.device.type == "cuda" for parameter in folded.parameters())
        assert torch.equal(folded.weight.cpu(), expected.weight)
        assert torch.equal(folded.bias.cpu(), expected.bias)
