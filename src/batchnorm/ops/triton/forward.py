"""The operators of the forward pass on a GPU. Imports Triton."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from batchnorm.ops.schema import needs_sign, statistics_dtype
from batchnorm.ops.triton.averages import Averages
from batchnorm.ops.triton.kernels.forward import forward as kernel
from batchnorm.ops.triton.launching import Data, channels, columns, mask_of, perform, scalar, vector


@dataclasses.dataclass(frozen=True)
class Vectors:
    """What there is for each channel (of each ghost): results where statistics are made, given otherwise."""

    mean: Tensor
    var: Tensor | None = None
    invstd: Tensor | None = None
    m2: Tensor | None = None
    count: Tensor | None = None


def stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """count, mean and m2, in one launch."""
    data = Data(x)
    count, mean, m2 = scalar(x), channels(x), channels(x)
    _forward(data, Vectors(mean, m2=m2, count=count), None, None, None, mask, "none")
    return count, mean, m2


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y and sign for given statistics."""
    data, y = _with_output(x)
    sign = data.sign() if needs_sign(activation, residual) else x.new_empty(0, dtype=torch.uint8)
    given = Vectors(mean.contiguous(), invstd=invstd.contiguous())
    _forward(data, given, weight, bias, residual, mask, activation, y=y[1], sign=sign, statistics=False)
    return data.finish(y), sign


def infer(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """y for the running statistics."""
    data, y = _with_output(x)
    given = Vectors(running_mean.contiguous(), var=running_var.contiguous())
    _forward(data, given, weight, bias, residual, mask, activation, y=y[1], statistics=False, eps=eps)
    return data.finish(y)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1."""
    data, y = _with_output(x)
    sign = data.sign() if needs_sign(activation, residual) else x.new_empty(0, dtype=torch.uint8)
    count, mean, var, invstd = scalar(x), channels(x), channels(x), channels(x)
    made = Vectors(mean, var, invstd, count=count)
    _forward(data, made, weight, bias, residual, mask, activation, y=y[1], sign=sign, eps=eps)
    return data.finish(y), count, mean, var, invstd, sign


def train_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    momentum: float | None,
    num_batches: Tensor | None,
    ddof: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 with the running averages moved; ``saved`` is mean, invstd and count."""
    data, y = _with_output(x)
    sign = data.sign() if needs_sign(activation, residual) else x.new_empty(0, dtype=torch.uint8)
    saved = x.new_empty(2 * x.size(1) + 1, dtype=statistics_dtype(x.device))
    mean, invstd, count = saved.split([x.size(1), x.size(1), 1])
    averages = Averages.of(running_mean, running_var, momentum, num_batches, ddof)
    made = Vectors(mean, invstd=invstd, count=count)
    _forward(data, made, weight, bias, residual, mask, activation, y=y[1], sign=sign, eps=eps, averages=averages)
    if averages is not None:
        averages.finish()
    return data.finish(y), saved, sign


def ghost_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    size: int,
    ghosts: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 in each ghost; a row of ``saved`` is mean, var, invstd and count."""
    data, y = _with_output(x)
    sign = data.sign() if needs_sign(activation, residual) else x.new_empty(0, dtype=torch.uint8)
    saved = x.new_empty(ghosts, 3 * x.size(1) + 1, dtype=statistics_dtype(x.device))
    made = Vectors(**columns(saved, x.size(1)))
    cut = (size, ghosts)
    _forward(data, made, weight, bias, residual, mask, activation, y=y[1], sign=sign, eps=eps, cut=cut)
    return data.finish(y), saved, sign


def _forward(
    data: Data,
    vectors: Vectors,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    *,
    y: Tensor | None = None,
    sign: Tensor | None = None,
    statistics: bool = True,
    eps: float = 1.0,
    cut: tuple[int, int] | None = None,
    averages: Averages | None = None,
) -> None:
    size, ghosts = cut or (data.samples, 1)
    problem = data.problem(operands=1 if residual is None else 2, backward=False, size=size, ghosts=ghosts)
    mask = mask_of(mask)
    arguments = {
        "x": data.x,
        "residual": None if residual is None else data.match(residual),
        "mask": mask,
        "weight": vector(weight),
        "bias": vector(bias),
        "y": y,
        "sign": None if sign is None or sign.numel() == 0 else sign,
        "mean_out": vectors.mean,
        "var_out": vectors.var,
        "invstd_out": vectors.invstd,
        "m2_out": vectors.m2,
        "count_out": vectors.count,
        "running_mean": None if averages is None else averages.mean,
        "running_var": None if averages is None else averages.var,
        "num_batches": None if averages is None else averages.num_batches,
        "momentum": 0.0 if averages is None else averages.momentum,
        "ddof": 0 if averages is None else averages.ddof,
        "eps": eps,
        "stride": 0 if cut is None else 3 * data.channels + 1,
        "FROM_VAR": vectors.invstd is None and not statistics,
    }
    wanted = {"STATISTICS": statistics, "APPLY": y is not None}
    perform(kernel, data, problem, wanted, arguments, vectors=3, activation=activation, mask=mask)


def _with_output(x: Tensor) -> tuple[Data, tuple[Tensor, Tensor]]:
    data = Data(x)
    return data, data.output()
