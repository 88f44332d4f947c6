"""Tries every operator on this machine: device, dtype and memory format, against float64, torch's own error beside.

The yardstick is three-way. An operator gets data in the dtype under test; the exact result is the reference's for the
same data in float64; the error is the largest difference, relative to the largest exact value. It must be no more
than that of torch's own batch norm on the same data, or a few roundings of the dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from batchnorm import _gpu
from batchnorm.ops import native, reference
from batchnorm.ops.formulas import FORMULAS

EPS = 1e-5
SHAPE = (8, 6, 5, 7)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MEANS = {"": 0.5, "mean 1e4, std 1": 1e4}


@dataclasses.dataclass(frozen=True)
class Check:
    """One operator, tried in one place.

    Attributes:
        op: the operator.
        device, dtype, memory_format: where and on what.
        implementation: "native", "triton" or "reference".
        error: largest difference from float64, relative to the largest exact value.
        peer_error: the same for torch's own batch norm; None where torch has no such function.
        tolerance: the error allowed.
        passed: whether ``error <= tolerance``.
        note: what is particular about the data.
    """

    op: str
    device: str
    dtype: str
    memory_format: str
    implementation: str
    error: float
    peer_error: float | None
    tolerance: float
    passed: bool
    note: str


def run(devices: Iterable[str] | None = None, seed: int = 0) -> list[Check]:
    """Try every operator on each device (default: all that there are). Deterministic for a seed."""
    checks: list[Check] = []
    for device in devices if devices is not None else _devices():
        for dtype in DTYPES:
            if device == "mps" and dtype == torch.float64:
                continue
            for format_name, memory_format in FORMATS.items():
                for note, mean in MEANS.items():
                    if mean > 1e3 and dtype.itemsize < 4:
                        continue  # the data themselves would be rounded to a few values
                    data = _Data.draw(seed, mean, dtype, device, memory_format)
                    checks += _try_all(data, device, str(dtype).removeprefix("torch."), format_name, note)
    return checks


@dataclasses.dataclass(frozen=True)
class _Data:
    x: Tensor
    grad: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor

    @classmethod
    def draw(cls, seed: int, mean: float, dtype: torch.dtype, device: str, memory_format: torch.memory_format) -> _Data:
        generator = torch.Generator().manual_seed(seed)
        channels = SHAPE[1]
        parameter = torch.float32 if dtype.itemsize < 4 else dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def place(values: Tensor) -> Tensor:
            return values.to(dtype).to(device).contiguous(memory_format=memory_format)

        return cls(
            x=place(normal(*SHAPE) + mean),
            grad=place(normal(*SHAPE)),
            residual=place(normal(*SHAPE)),
            weight=(1 + 0.2 * normal(channels)).to(parameter).to(device),
            bias=(0.3 * normal(channels)).to(parameter).to(device),
            mask=(torch.rand(SHAPE[0], *SHAPE[2:], generator=generator) > 0.2).to(device),
        )

    def widened(self) -> _Data:
        """The same values in float64 on the CPU, where every device's result can be judged."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return _Data(*(t.cpu() if t.dtype == torch.bool else t.cpu().double() for t in tensors))


def _try_all(data: _Data, device: str, dtype: str, memory_format: str, note: str) -> list[Check]:
    operators = _results(torch.ops.batchnorm, data)
    exact = _results(FORMULAS, data.widened())
    peers = _torch_results(data)
    roundings = _roundings(data.x)
    checks = []
    implementations = _implementations(data.x)
    for name, result in operators.items():
        error = _error(result, exact[name])
        peer = _error(peers[name], exact[name]) if name in peers else None
        tolerance = max(roundings, peer or 0.0)
        checks.append(
            Check(
                op=name,
                device=device,
                dtype=dtype,
                memory_format=memory_format,
                implementation=implementations.get(name.split("+")[0].strip(), "reference"),
                error=error,
                peer_error=peer,
                tolerance=tolerance,
                passed=error <= tolerance,  # false for NaN
                note=note,
            )
        )
    return checks


def _implementations(x: Tensor) -> dict[str, str]:
    """What runs each operator, where it is not the reference; asked once it has run."""
    status = native.status()
    if x.device.type == "cuda" and x.dtype in _gpu.DTYPES:
        return dict.fromkeys(status.cuda_operators, "triton")
    return dict.fromkeys(status.operators, "native") if x.device.type == "cpu" else {}


def _roundings(x: Tensor) -> float:
    """The error that an honest implementation may have."""
    eps = torch.finfo(x.dtype).eps
    if x.dtype == torch.float64:
        # The yardstick is float64 too, and x - mean loses what the mean's digits take up.
        wide = x.cpu()
        return 16 * eps * max(1.0, (wide.mean().abs() / wide.std()).item())
    # A few operations of float32, each rounding once; narrower types are computed wider and rounded once at the end.
    return (4 if x.dtype == torch.float32 else 1) * eps


def _results(ops: object, data: _Data) -> dict[str, tuple[Tensor, ...]]:
    """Every operator's outputs, all from the same exact statistics, so that an operator's error is its own."""
    d, call = data, functools.partial(getattr, ops)
    wide = data.widened()
    count, mean, m2 = (value.to(d.x.device) for value in reference.stats(wide.x, None))
    if d.x.device.type == "mps":
        count, mean, m2 = count.float(), mean.float(), m2.float()
    var = m2 / count
    invstd = torch.rsqrt(var + EPS)
    saved = (d.grad, d.x, mean, invstd, d.weight, d.bias, None, None, None, "relu")
    sums = call("grad_sums")(*saved)
    running = (torch.zeros_like(mean), torch.ones_like(var))
    call("update_running")(*running, mean, var, count, 0.1, None, 1)
    step = call("train_step")(d.x, d.weight, d.bias, d.residual, None, None, None, EPS, 0.1, None, 1, "silu")
    kept = torch.cat([mean, invstd, count.reshape(1)])
    forward = call("train_forward")(d.x, d.weight, d.bias, None, None, EPS, "none")
    masked = call("train_forward")(d.x, d.weight, d.bias, d.residual, d.mask, EPS, "relu")
    ghosts = call("ghost_forward")(d.x, d.weight, d.bias, d.residual, d.mask, 3, 3, EPS, "silu")
    cut = (d.weight, d.bias, d.residual, None, d.mask, 3, "silu", True)
    averages = (torch.zeros_like(mean), torch.ones_like(var))
    call("ghost_update")(*averages, ghosts[1], 0.1, None, 1)
    plain = (d.grad, d.x, mean, invstd, d.weight, d.bias, None, None, None, "none")
    return {
        "stats": call("stats")(d.x, None)[1:],
        "stats + mask": call("stats")(d.x, d.mask),
        "normalize": call("normalize")(d.x, mean, invstd, d.weight, d.bias, None, None, "relu")[:1],
        "train_forward": forward[:1],
        "train_forward + mask, residual, relu": masked[:1],
        "grad_sums": sums,
        "grad_input": call("grad_input")(*saved, count, *sums, True),
        "train_backward": call("train_backward")(*plain, count, False)[:1],
        "update_running": running,
        "ghost_forward + mask, residual, silu": ghosts[:2],
        "ghost_backward + mask, residual, silu": call("ghost_backward")(d.grad, d.x, ghosts[1], *cut),
        "ghost_update": averages,
        "infer": (call("infer")(d.x, mean, var, d.weight, d.bias, None, None, EPS, "relu"),),
        "train_step + residual, silu": step[:1],
        "train_step_backward + residual, silu": call("train_step_backward")(
            d.grad, d.x, kept, d.weight, d.bias, d.residual, None, None, "silu", True
        ),
    }


def _torch_results(data: _Data) -> dict[str, tuple[Tensor, ...]]:
    x = data.x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = functional.batch_norm(x, None, None, data.weight, data.bias, training=True, eps=EPS)
    y.backward(data.grad)
    axes = (0, 2, 3)
    var, mean = torch.var_mean(data.x, axes, correction=0)
    assert x.grad is not None
    return {
        "stats": (mean, var * (x.numel() // x.size(1))),
        "train_forward": (y.detach(),),
        "train_backward": (x.grad,),
    }


def _error(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    relative = [
        (result.detach().cpu().double() - truth).abs().max() / truth.abs().max().clamp(min=1e-300)
        for result, truth in zip(results, exact, strict=True)
    ]
    return torch.stack(relative).max().item()  # torch's max, which keeps a NaN


def _devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
