"""What statistics as constants do to training: a bias that learns alone, and looks at whole nets.

Ioffe & Szegedy 2015, section 2, "Towards Reducing Internal Covariate Shift".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.nn import BatchNorm1d, NormOutsideGradient, WhitenedLinear
from batchnorm.study import training
from batchnorm.study.plan import Run
from batchnorm.study.records import Record
from batchnorm.surgery import recalibrate

TOY = {"outside": lambda: NormOutsideGradient(1, "mean", affine=False), "batch": lambda: BatchNorm1d(1, affine=False)}
"""The layer behind the toy's bias: the mean as a constant, and batch norm."""
PARTS = ("hidden biases", "hidden weights", "all")
"""The parameters whose step is asked what it keeps. Hidden: of the linear layers that a normalization follows."""
# Short enough that a loss is a straight line along it, as far as float64 can tell.
_ETA = 1e-5


def toy(run: Run, at: Sequence[int]) -> list[Record]:
    """Learn b alone in ``mean((N(u + b) - t)^2)`` by gradient descent, with u ~ N(0, 1) and t = 2 + N(0, 1), 100 each.

    N subtracts the mean, as a constant (variant "outside") or, in "batch", is batch norm. The mean of N's output is 0
    whatever b is, so the loss does not depend on b. With the mean as a constant the gradient of b is -2 mean(t) at
    every step, and ``b = 2 lr k mean(t)`` after k.

    Records ``toy_bias``, ``toy_loss`` and ``toy_gradient`` at the steps ``at``, each with its ``layer``. In float64.
    """
    generator = torch.Generator().manual_seed(run.seed)
    u = torch.randn(100, 1, generator=generator, dtype=torch.float64)
    target = 2.0 + torch.randn(100, 1, generator=generator, dtype=torch.float64)
    lines: list[Record] = []
    for name, make in TOY.items():
        layer = make().double()
        b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        for step in range(max(at) + 1):
            loss = (layer(u + b) - target).square().mean()
            (gradient,) = torch.autograd.grad(loss, b)
            if step in at:
                found = {"toy_bias": b.item(), "toy_loss": loss.item(), "toy_gradient": gradient.item()}
                lines += [run.record(step, metric, value, layer=name) for metric, value in found.items()]
            with torch.no_grad():
                b -= run.params["lr"] * gradient
    return lines


class OutsideLooks:
    """What :func:`execution.train_net` calls as ``look(step, model)``: a look at each step that its ``every`` divides.

    A look is at a copy whose statistics are those of all of ``train`` (:func:`batchnorm.surgery.recalibrate`), since
    running averages lag behind weights that run away. ``lines`` are its records: ``bias_norm`` and ``weight_norm`` of
    the hidden linear layers, ``train_loss``, ``fresh_accuracy`` (of ``test``), and where ``run.params["kept"]`` asks
    for it ``kept``, by :data:`PARTS`, on one batch. Linear layers that can be re-expressed are, every ``interval``
    steps, and ``change`` is what that changes of the outputs, relative to the largest.
    """

    def __init__(self, run: Run, train: training.Data, test: training.Data) -> None:
        self.lines: list[Record] = []
        self._run = run
        self._train = train
        self._test = test

    def __call__(self, step: int, model: nn.Sequential) -> None:
        """Look at ``model`` after ``step``, and reproject what can be."""
        if step % self._run.params["every"] == 0:
            self._look(step, model)
        due = 0 < step < self._run.steps and step % self._run.params["interval"] == 0
        if due and any(isinstance(layer, WhitenedLinear) for layer in model):
            self.lines.append(self._run.record(step, "change", _finite(self._reproject(model))))

    def _look(self, step: int, model: nn.Sequential) -> None:
        for metric, value in self._found(model).items():
            self.lines.append(self._run.record(step, metric, _finite(value)))
        if self._run.params.get("kept"):
            size = self._run.params["batch"]
            for part, share in kept(model, (self._train[0][:size], self._train[1][:size])).items():
                self.lines.append(self._run.record(step, "kept", _finite(share), part=part))

    @torch.no_grad()
    def _found(self, model: nn.Sequential) -> dict[str, float]:
        fresh = copy.deepcopy(model)
        if any(isinstance(layer, BatchNorm1d | NormOutsideGradient) for layer in model):
            recalibrate(fresh, [self._train[0]])
        fresh.eval()
        return {
            "bias_norm": _length(_biases(model)),
            "weight_norm": _length(_weights(model)),
            "train_loss": float(cross_entropy(fresh(self._train[0]), self._train[1])),
            "fresh_accuracy": training.accuracy(fresh, self._test),
        }

    @torch.no_grad()
    def _reproject(self, model: nn.Sequential) -> float:
        model.eval()
        before = model(self._test[0])
        for layer in model:
            if isinstance(layer, WhitenedLinear):
                layer.reproject()
        after = model(self._test[0])
        model.train()
        return float((after - before).abs().max() / before.abs().max())


def hidden(model: nn.Sequential) -> list[nn.Linear | WhitenedLinear]:
    """The linear layers of ``model`` but for the last."""
    return [layer for layer in model if isinstance(layer, nn.Linear | WhitenedLinear)][:-1]


def kept(model: nn.Sequential, data: training.Data) -> dict[str, float | None]:
    """The share of the loss decrease promised by a short step of gradient descent that the step keeps, by part.

    A step ``theta - eta g`` promises the loss to fall by ``eta ||g||^2``; kept is ``(L(theta) - L(theta - eta g)) /
    (eta ||g||^2)`` with the loss of ``data`` in train mode, statistics taken anew for each. None where the gradient is
    zero to rounding and thus promises nothing. In float64, on a copy.
    """
    wide = copy.deepcopy(model).double().train()
    features, labels = data[0].double(), data[1]
    loss = cross_entropy(wide(features), labels)
    everything: list[Tensor] = list(wide.parameters())
    gradients = dict(zip(everything, torch.autograd.grad(loss, everything), strict=True))
    largest = _length(gradients.values())
    chosen: tuple[list[Tensor], ...] = (_biases(wide), _weights(wide), everything)
    shares: dict[str, float | None] = {}
    for part, parameters in zip(PARTS, chosen, strict=True):
        length = _length(gradients[parameter] for parameter in parameters)
        if not 1e-9 * largest < length < math.inf:
            shares[part] = None
            continue
        # A way of the same length whatever the gradient's: the loss stays straight along it.
        eta = _ETA / length
        with torch.no_grad():
            before = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.sub_(gradients[parameter], alpha=eta)
            fallen = float(loss) - float(cross_entropy(wide(features), labels))
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        shares[part] = fallen / (eta * length**2)
    return shares


def _biases(model: nn.Sequential) -> list[Tensor]:
    return [layer.bias for layer in hidden(model) if layer.bias is not None]


def _weights(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight for layer in hidden(model)]


def _length(parts: Iterable[Tensor]) -> float:
    return math.hypot(*(float(part.norm()) for part in parts))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
