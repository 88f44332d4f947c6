"""The operators of the backward pass on a GPU. Imports Triton."""

from __future__ import annotations

from torch import Tensor

from batchnorm.ops.triton.kernels.backward import backward as kernel
from batchnorm.ops.triton.launching import Data, channels, columns, mask_of, perform, vector


def grad_sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """sum dz and sum dz * x_hat, in one launch."""
    sums = channels(x), channels(x)
    given = _Given(grad, mean, invstd, None, weight, bias, residual, sign, mask, activation)
    _backward(Data(x), given, sums)
    return sums


def grad_input(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
    count: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    want_residual: bool,
) -> tuple[Tensor, Tensor]:
    """dx and the residual's gradient for given sums."""
    data = Data(x)
    given = _Given(grad, mean, invstd, count, weight, bias, residual, sign, mask, activation)
    outputs = data.output(), data.output() if want_residual else None
    _backward(data, given, (sum_dz.contiguous(), sum_dz_xhat.contiguous()), outputs, sums=False)
    return _finished(data, outputs)


def train_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
    count: Tensor,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients of a training step."""
    data = Data(x)
    given = _Given(grad, mean, invstd, count, weight, bias, residual, sign, mask, activation)
    outputs = data.output(), data.output() if want_residual else None
    sum_dz, sum_dz_xhat = channels(x), channels(x)
    # The parameters' gradients are the sums, in the parameters' types.
    dweight, dbias = (None if p is None else p.new_empty(x.size(1)) for p in (weight, bias))
    _backward(data, given, (sum_dz, sum_dz_xhat), outputs, parameters=(dweight, dbias))
    dx, dresidual = _finished(data, outputs)
    return dx, sum_dz_xhat if dweight is None else dweight, sum_dz if dbias is None else dbias, dresidual


def train_step_backward(
    grad: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    activation: str,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`train_backward` from what :func:`train_step` saved."""
    mean, invstd, count = saved.contiguous().split([x.size(1), x.size(1), 1])
    affine = (weight, bias, residual, sign, mask, activation)
    return train_backward(grad, x, mean, invstd, *affine, count, want_residual)


def ghost_backward(
    grad: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sign: Tensor | None,
    mask: Tensor | None,
    size: int,
    activation: str,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of each ghost; those of weight and bias are added up, in the order of ghosts."""
    data, ghosts = Data(x), saved.size(0)
    kept = columns(saved.contiguous(), x.size(1))
    given = _Given(
        grad, kept["mean"], kept["invstd"], kept["count"], weight, bias, residual, sign, mask, activation
    )  # fmt: skip
    outputs = data.output(), data.output() if want_residual else None
    sums = saved.new_empty(ghosts, x.size(1)), saved.new_empty(ghosts, x.size(1))
    _backward(data, given, sums, outputs, cut=(size, ghosts))
    dx, dresidual = _finished(data, outputs)
    dbias, dweight = (s.sum(0) for s in sums)
    return (
        dx,
        dweight if weight is None else dweight.to(weight.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
        dresidual,
    )


class _Given:
    """What a backward pass is given besides x, as the kernels take it."""

    def __init__(
        self,
        grad: Tensor,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        sign: Tensor | None,
        mask: Tensor | None,
        activation: str,
    ) -> None:
        self.grad, self.count, self.activation = grad, count, activation
        self.sign = sign.contiguous() if sign is not None and sign.numel() > 0 else None
        self.residual = residual if self.sign is None and activation != "none" else None
        # Those of ghosts are columns of a matrix, and stay in it.
        self.mean, self.invstd = (s if s.dim() == 2 else s.contiguous() for s in (mean, invstd))
        self.weight, self.bias = vector(weight), vector(bias)
        self.mask = mask_of(mask)


def _backward(
    data: Data,
    given: _Given,
    totals: tuple[Tensor, Tensor],
    outputs: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None] = (None, None),
    *,
    sums: bool = True,
    parameters: tuple[Tensor | None, Tensor | None] = (None, None),
    cut: tuple[int, int] | None = None,
) -> None:
    size, ghosts = cut or (data.samples, 1)
    operands = 2 if given.residual is None else 3
    problem = data.problem(operands=operands, backward=True, size=size, ghosts=ghosts)
    dx, dresidual = outputs
    arguments = {
        "grad": data.match(given.grad),
        "x": data.x,
        "residual": None if given.residual is None else data.match(given.residual),
        "sign": given.sign,
        "mask": given.mask,
        "weight": given.weight,
        "bias": given.bias,
        "mean_in": given.mean,
        "invstd_in": given.invstd,
        "count_in": given.count,
        "dx": None if dx is None else dx[1],
        "dresidual": None if dresidual is None else dresidual[1],
        "dz_out": totals[0],
        "dz_xhat_out": totals[1],
        "dweight": parameters[0],
        "dbias": parameters[1],
        "stride": 0 if cut is None else 3 * data.channels + 1,
    }
    wanted = {"SUMS": sums, "APPLY": dx is not None}
    perform(kernel, data, problem, wanted, arguments, vectors=2, activation=given.activation, mask=given.mask)


def _finished(data: Data, outputs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    dx, dresidual = outputs
    return data.finish(dx), data.like.new_empty(0) if dresidual is None else data.finish(dresidual)
