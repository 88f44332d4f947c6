"""Every kernel of every instruction set that this machine has, against the reference in float64.

A tolerance counts roundings: the type in which the kernels compute may round a few times at the size of what it adds
up, the type of the data once more at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from batchnorm.ops import reference
from batchnorm.ops.schema import ACTIVATIONS

SETS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = 1e-5
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d

# Shapes whose runs end inside a vector of every width, begin a second one, or are shorter than any.
LAYOUTS: dict[str, tuple[tuple[int, ...], Any]] = {
    "(N, C)": ((9, 7), None),
    "(N, 1)": ((33, 1), None),
    "(1, C)": ((1, 17), None),
    "(N, 33)": ((6, 33), None),
    "(N, 100)": ((21, 100), None),
    "(N, C, 1)": ((5, 3, 1), None),
    "(N, C, L)": ((4, 3, 17), None),
    "(N, C, L) last": ((3, 5, 17), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "5 positions": ((3, 7, 5, 1), None),
    "49 positions": ((3, 17, 7, 7), None),
    "one channel": ((4, 1, 5, 9), None),
    "more channels than are summed at a time": ((2, 70, 3, 3), None),
    "channels_last": ((3, 7, 5, 2), lambda x: x.contiguous(memory_format=LAST)),
    "channels_last, 3": ((2, 3, 5, 5), lambda x: x.contiguous(memory_format=LAST)),
    "channels_last, 33": ((2, 33, 3, 3), lambda x: x.contiguous(memory_format=LAST)),
    "channels_last, 64": ((3, 64, 3, 1), lambda x: x.contiguous(memory_format=LAST)),
    "channels_last_3d": ((2, 17, 2, 3, 2), lambda x: x.contiguous(memory_format=LAST_3D)),
    "3-D": ((2, 3, 3, 3, 3), None),
    "permuted": ((3, 7, 5, 4), lambda x: x.transpose(2, 3)),
    "reversed order": ((5, 6, 7, 3), lambda x: x.permute(3, 2, 1, 0)),
    "sliced": ((4, 9, 6, 7), lambda x: x[:, ::2, :, 1:]),
    "expanded": ((1, 7, 5, 3), lambda x: x.expand(4, -1, -1, -1)),
    "misaligned": ((2, 5, 7, 3), lambda x: x.flatten()[1:181].view(2, 5, 6, 3)),
}


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set in turn, those that this processor lacks left out; put back afterwards."""
    request.getfixturevalue("library")
    if request.param not in torch.ops.batchnorm._instruction_sets().split():
        pytest.skip(f"this processor has no {request.param}")
    before = torch.ops.batchnorm._instruction_set("")
    assert torch.ops.batchnorm._instruction_set(request.param) == request.param
    yield request.param
    torch.ops.batchnorm._instruction_set(before)


@dataclasses.dataclass
class Case:
    """Arguments of the operators for one layout, and the same widened to float64."""

    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    activation: str

    @classmethod
    def draw(cls, layout: str, dtype: torch.dtype, activation: str, masked: bool, added: bool, affine: bool) -> Case:
        shape, arrange = LAYOUTS[layout]

        def values(scale: float, offset: float) -> Tensor:
            tensor = (torch.randn(shape, dtype=torch.float64) * scale + offset).to(dtype)
            return tensor if arrange is None else arrange(tensor)

        x = values(3, 10)
        parameter = dtype if dtype.itemsize > 2 else torch.float32
        return cls(
            x=x,
            grad=values(1, 0),
            weight=torch.randn(x.size(1)).to(parameter) if affine else None,
            bias=torch.randn(x.size(1)).to(parameter) if affine else None,
            residual=values(1, 0) if added else None,
            mask=torch.rand(x.size(0), *x.shape[2:]) > 0.3 if masked else None,
            activation=activation,
        )

    def wide(self) -> Case:
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        widened = {k: v.double() for k, v in changed.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return dataclasses.replace(self, **widened)

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.weight, self.bias, self.residual

    def roundings(self) -> float:
        """What an operation at size 1 may lose: a few roundings, and a few more in an exponential."""
        computed_in = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        return (32 if self.activation in ("silu", "gelu") else 12) * torch.finfo(computed_in).eps

    def rounding_of_means(self, invstd: Tensor) -> float:
        """What the means' own last place, of a float64, makes of the normalized values."""
        scale = invstd if self.weight is None else invstd * self.weight.double().abs().clamp(min=1)
        return 8 * torch.finfo(torch.float64).eps * self.x.abs().max().item() * scale.max().item()


def assert_close(ours: Tensor, exact: Tensor, error: float, what: str) -> None:
    """Whether each element differs by ``error`` at most, and by a rounding to its own type."""
    assert exact.dtype == torch.float64
    last = torch.finfo(ours.dtype)
    allowed = exact.abs() * (last.eps / 2) * (1 + 1e-6) + error + last.smallest_normal * last.eps
    difference = (ours.double() - exact).abs()
    assert bool((difference <= allowed).all()), f"{what}: {difference.max():.3g}, allowed {allowed.max():.3g}"


def assert_equal(results: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> None:
    """Bit for bit: the operators that do all at once do the same."""
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def check_forward(case: Case, layout: str) -> tuple[Tensor, ...]:
    """normalize and train_forward; returns the exact statistics and the sign to go on with."""
    x, wide = case.x, case.wide()
    exact = reference.train_forward(wide.x, *wide.affine, case.mask, EPS, case.activation)
    count, mean, var, invstd = exact[1:5]
    z = reference.train_forward(wide.x, *wide.affine, case.mask, EPS, "none")[0]
    residual = 0.0 if wide.residual is None else wide.residual.abs().max().item()
    size = max(1.0, z.abs().max().item() + residual) * case.roundings() + case.rounding_of_means(invstd)

    y, *statistics, sign = torch.ops.batchnorm.train_forward(x, *case.affine, case.mask, EPS, case.activation)
    once = torch.ops.batchnorm.train_step(x, *case.affine, case.mask, None, None, EPS, 0.1, None, 1, case.activation)
    assert_equal(once, (y, torch.cat([*statistics[1::2], statistics[0].view(1)]), sign))
    given, given_sign = torch.ops.batchnorm.normalize(x, mean, invstd, *case.affine, case.mask, case.activation)
    for result, bits, name in ((y, sign, "train_forward"), (given, given_sign, "normalize")):
        assert result.dtype == x.dtype
        assert result.shape == x.shape
        assert result.stride() == torch.empty_like(x).stride(), f"{name}: strides"
        assert_close(result, exact[0], size, f"{name} {layout} {case.activation}")
        like = reference.normalize(x, mean, invstd, *case.affine, case.mask, case.activation)[1]
        assert bits.shape == like.shape, f"{name}: bytes of sign"
        if bits.numel():
            real = torch.ones_like(z, dtype=torch.bool) if case.mask is None else case.mask.unsqueeze(1).expand_as(z)
            sure = (z.abs() > size) & real
            assert torch.equal(reference._unpack(bits, x)[sure], (z > 0)[sure]), f"{name}: sign"
        if case.mask is not None:
            assert not result.movedim(1, -1)[~case.mask].any(), f"{name}: padding"
    for ours, theirs in zip(statistics, (count, mean, var, invstd), strict=True):
        # Of 16-bit data a few deviations are added in float32 first.
        rtol, atol = (1e-6, 1e-6) if x.dtype.itemsize == 2 else (1e-12, 1e-13)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    return count, mean, invstd, sign


def check_backward(case: Case, layout: str, count: Tensor, mean: Tensor, invstd: Tensor, sign: Tensor) -> None:
    """grad_sums, grad_input and train_backward."""
    x, wide, ops = case.x, case.wide(), torch.ops.batchnorm
    label = f"{layout} {case.activation}"
    # The reference reads the bits in the order of x as it came.
    above = reference._unpack(sign, x) if sign.numel() else None
    wide_sign = None if above is None else reference._pack(above.double() - 0.5, wide.x)
    exact_saved = (wide.grad, wide.x, mean, invstd, *wide.affine, wide_sign, case.mask, case.activation)
    saved = (case.grad, x, mean, invstd, *case.affine, sign if sign.numel() else None, case.mask, case.activation)
    dz = reference.grad_input(*exact_saved, count, torch.zeros_like(mean), torch.zeros_like(mean), True)[1]
    x_hat = reference._x_hat(wide.x, mean, invstd, case.mask)
    dz_size = wide.grad.abs().max().item() * 1.2
    scale = (invstd if wide.weight is None else invstd * wide.weight).abs().max().item()
    # Deviations from the mean are computed at the data's size once the mean has been taken off.
    far = x_hat.abs().max().item() + 1.0
    of_means = case.rounding_of_means(invstd) * dz_size * far

    sums = ops.grad_sums(*saved)
    exact_sums = reference.grad_sums(*exact_saved)
    number = max(1.0, count.item())
    for ours, theirs, size, name in zip(sums, exact_sums, (1.0, far), ("sum_dz", "sum_dz_xhat"), strict=True):
        assert ours.dtype == torch.float64
        assert_close(ours, theirs, number * (dz_size * size * case.roundings() + of_means), f"{name} {label}")

    dx, dresidual = ops.grad_input(*saved, count, *exact_sums, True)
    step_dx, dweight, dbias, step_dresidual = whole = ops.train_backward(*saved, count, True)
    kept = torch.cat([mean, invstd, count.view(1)])
    assert_equal(ops.train_step_backward(*saved[:2], kept, *saved[4:], True), whole)
    exact_dx, exact_dresidual = reference.grad_input(*exact_saved, count, *exact_sums, True)
    assert torch.equal(dz, exact_dresidual)
    size = scale * (dz_size * far * far * case.roundings() + of_means)
    for ours, name in ((dx, "grad_input"), (step_dx, "train_backward")):
        assert ours.stride() == torch.empty_like(x).stride(), f"{name}: strides"
        assert_close(ours, exact_dx, size, f"{name} {label}")
    for ours in (dresidual, step_dresidual):
        assert_close(ours, exact_dresidual, dz_size * far * case.roundings() + of_means, f"dresidual {label}")
    assert ops.train_backward(*saved, count, False)[3].numel() == 0
    for ours, theirs, parameter in ((dbias, exact_sums[0], case.bias), (dweight, exact_sums[1], case.weight)):
        assert ours.dtype == (torch.float64 if parameter is None else parameter.dtype)
        assert_close(ours, theirs, number * (dz_size * far * case.roundings() + of_means), f"parameters {label}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("instruction_set")
def test_the_kernels_agree_with_the_reference(layout, dtype):
    first = list(LAYOUTS).index(layout)
    for i, activation in enumerate(ACTIVATIONS):
        # One of the four ways to have a mask or a residual for each, in float32 two; the layouts take turns at which.
        for turn in (first + i, first + i + 1 + first % 3)[: 2 if dtype == torch.float32 else 1]:
            masked, added = turn % 2 == 1, turn // 2 % 2 == 1
            case = Case.draw(layout, dtype, activation, masked, added, affine=turn % 5 != 0)
            check_backward(case, layout, *check_forward(case, layout))


@pytest.mark.usefixtures("library")
def test_no_instruction_set_goes_untested():
    assert set(torch.ops.batchnorm._instruction_sets().split()) <= set(SETS)
    with pytest.raises(RuntimeError, match="this processor has no mmx"):
        torch.ops.batchnorm._instruction_set("mmx")


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 16421), (1, 1, 40000), (3000, 5), (130, 3, 130), (2, 130, 300)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.usefixtures("instruction_set")
def test_large_shapes_are_cut_into_pieces_without_a_gap(shape, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "large", (shape, None))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for masked in (False, True):
                case = Case.draw("large", torch.float32, "relu", masked, count == 2, affine=True)
                check_backward(case, f"large, {count} threads", *check_forward(case, "large"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.usefixtures("instruction_set")
def test_a_mean_of_1e4_costs_no_digits(memory_format):
    x = (torch.randn(16, 24, 14, 14, dtype=torch.float64) + 1e4).float().contiguous(memory_format=memory_format)
    grad = torch.randn(x.shape).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(24), torch.randn(24)
    wide = (x.double(), weight.double(), bias.double(), None, None, EPS, "relu")
    exact_y, count, mean, _, invstd, _ = reference.train_forward(*wide)
    y, *_ = torch.ops.batchnorm.train_forward(x, weight, bias, None, None, EPS, "relu")
    assert relative_error(y, exact_y) < 1e-6
    saved = (mean, invstd, weight.double(), bias.double(), None, None, None, "relu", count, False)
    exact = reference.train_backward(grad.double(), x.double(), *saved)[:3]
    saved = (mean, invstd, weight, bias, None, None, None, "relu", count, False)
    for ours, theirs in zip(torch.ops.batchnorm.train_backward(grad, x, *saved), exact, strict=False):
        assert relative_error(ours, theirs) < 1e-6


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest exact value."""
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("activation", ["silu", "gelu", "hardswish"])
@pytest.mark.usefixtures("instruction_set")
def test_smooth_activations_are_as_exact_as_torchs(activation):
    z = torch.linspace(-12, 12, 4801).view(1, 1, -1)
    wide = z.double().requires_grad_()
    theirs = z.clone().requires_grad_()
    for leaf in (wide, theirs):
        reference.activate(leaf, activation).sum().backward()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    y = torch.ops.batchnorm.normalize(z, zero, one, None, None, None, None, activation)[0]
    saved = (torch.ones_like(z), z, zero, one, None, None, None, None, None, activation, one, zero, zero, False)
    dz = torch.ops.batchnorm.grad_input(*saved)[0]
    apply = getattr(functional, activation)
    for ours, torchs, exact in ((y, apply(z), apply(z.double())), (dz, theirs.grad, wide.grad)):
        error = worst_in_roundings(ours, exact)
        assert error <= max(worst_in_roundings(torchs, exact), 2.0), error


def worst_in_roundings(result: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of float32, counted at size 1 for what is smaller than that."""
    eps = torch.finfo(torch.float32).eps
    return ((result.double() - exact).abs() / (eps * exact.abs().clamp(min=1))).max().item()
