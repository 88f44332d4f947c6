"""Batch normalization as a function of its tensors: checks, choice of route, running averages."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, ShapeError
from batchnorm.ops import averages, collectives, eager, exported, ghost, per_sample, reference
from batchnorm.ops.arguments import (
    check_eps,
    check_inference_weight,
    check_input,
    check_residual,
    positions,
    real_values,
    single_value,
)
from batchnorm.ops.averages import in_backward
from batchnorm.ops.formulas import FORMULAS
from batchnorm.ops.schema import ACTIVATIONS, statistics_dtype
from batchnorm.ops.synchronized import Part

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "hardswish"]
OnSingleValue = Literal["raise", "running", "skip"]
SINGLE_VALUE_POLICIES = ("raise", "running", "skip")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    ddof: int = 1,
    num_batches_tracked: Tensor | None = None,
    on_single_value: OnSingleValue = "raise",
    inference_weight: float = 0.0,
    group: Any = None,
    virtual_batch_size: int | None = None,
) -> Tensor:
    r"""Normalize each channel over a batch of data, then scale, shift, add and activate.

    .. math::
        \hat{x} = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \epsilon}}, \qquad
        y = \mathrm{activation}(\gamma \hat{x} + \beta + \mathrm{residual})

    With ``training=True``, mean and (biased) var are those of the batch, inside the gradient, and the running averages
    move towards them; otherwise they are ``running_mean`` and ``running_var`` and constant. The positional arguments
    are those of :func:`torch.nn.functional.batch_norm`, in its order.

    The running averages move once for a batch: not again when activation checkpointing recomputes this call in the
    backward pass (see :mod:`batchnorm.ops.averages` for how that is told).

    Args:
        input: x, (N, C) or (N, C, \*spatial), floating point.
        running_mean, running_var: (C,), updated in place in training where given (both or neither):
            ``running = (1 - momentum) * running + momentum * batch``. They are required with ``training=False``.
        weight, bias: gamma and beta, (C,), or (N, C) for each sample's own (conditional batch normalization); 1 and 0
            where None.
        momentum: the weight of the new value, torch's meaning. None: the cumulative average, whose weight is
            1 / ``num_batches_tracked``.
        eps: added to var, in units of x squared. Positive in training.
        mask: boolean, (N, \*spatial) or broadcastable to it, True where a position is real. Statistics and
            gradients are over real positions only; the output is zero elsewhere. A batch without a real position is
            not counted and leaves the running averages alone.
        lengths: (N,) integers, for (N, C, L) input: the first ``lengths[n]`` positions of row n are real.
        residual: x's shape, added before the activation.
        activation: "relu", "leaky_relu" (slope 0.01), "silu", "gelu" (exact), "hardswish" or None.
        ddof: 1 for an unbiased running variance (torch), 0 for a biased one (Keras, Flax, ONNX).
        num_batches_tracked: a 0-d integer tensor, counted up by one in training.
        on_single_value: what to do in training with one real value per channel, which has no deviation: "raise", as
            torch does; "running": normalize it with the running statistics; "skip": leave the normalization out,
            y = activation(gamma * x + beta + residual). The last two count and update nothing. With a mask on a device
            that would have to be waited for, or under torch.compile, "raise" does not: there x_hat is 0.
        inference_weight: with ``training=False``, how much the sample itself counts in its mean and variance, from 0
            (the running statistics alone) to 1: mean = alpha mean_n + (1 - alpha) running_mean, and var that of the
            mixture. Inside the gradient.
        group: a ``torch.distributed`` process group. In training the batch is then what all its processes give, each
            its own part, perhaps none; all of them have to call, forward and backward. The gradients of weight and
            bias are those of the own part. None, or a group of one: this process's batch.
        virtual_batch_size: in training, normalize each so many samples with their own statistics, as a batch each (see
            :class:`batchnorm.nn.GhostBatchNorm1d`).

    Returns:
        y, with the shape and dtype of x.

    Raises:
        ShapeError: (ValueError, RuntimeError) the input has no channel dimension, or another number of channels than a
            parameter; a single value per channel in training ("raise"); a mask, lengths or residual that does not fit.
        InputError: (ValueError) eps out of range, unknown activation, mask and lengths together.
        DtypeError: (TypeError, RuntimeError) x is not floating point, parameters are neither x's dtype nor float32
            beside a narrower x, a mask is not boolean.
        SynchronizationError: (RuntimeError) the processes of ``group`` disagree in channels or dtype, or one does not
            answer.
        Nothing is counted or updated when one of these is raised.

    Source: Ioffe & Szegedy (2015), Algorithms 1 and 2. inference_weight: Summers & Dinneen (2020), "Four Things
    Everyone Should Know to Improve Batch Normalization", section 3.1.
    """
    if input.dim() == 1 and input.numel() == 0:
        return input.clone()  # as torch does: nothing at all has no channels to speak of
    own_affine = check_input(input, running_mean, running_var, weight, bias, training)
    if not 0 < eps < math.inf:
        check_eps(eps, training)
    if residual is not None:
        residual = check_residual(input, residual)
    if training and running_mean is not None and momentum is None and num_batches_tracked is None:
        raise InputError("momentum=None is the cumulative average and needs num_batches_tracked")
    act = "none" if activation is None else activation
    check_choice("activation", act, ACTIVATIONS)
    real = None if mask is None and lengths is None else positions(input, mask, lengths)
    affine = (weight, bias, residual)

    if not training:
        assert running_mean is not None
        assert running_var is not None
        if inference_weight:
            check_inference_weight(inference_weight)
        return _evaluate(input, running_mean, running_var, affine, real, eps, act, own_affine, inference_weight)

    if group is not None and virtual_batch_size is not None:
        raise InputError("expected group or virtual_batch_size, got both: a virtual batch lies in one process")
    peers = None if group is None else collectives.peers(group)
    values = input.size(0) * math.prod(input.shape[2:]) if real is None else real_values(real)
    if on_single_value != "raise":
        check_choice("on_single_value", on_single_value, SINGLE_VALUE_POLICIES)
        if on_single_value == "running" and running_mean is None:
            raise InputError('on_single_value="running" needs running_mean and running_var')
    running = (running_mean, running_var, num_batches_tracked)
    if peers is not None:
        collectives.agree(input, peers, group)
        # Which way must not depend on the data: all ranks have to go the same.
        part = Part(peers, fused=not own_affine and operators() is not FORMULAS)
        return _compose(input, running, affine, momentum, eps, real, act, ddof, on_single_value, own_affine, part)
    if values == 1:
        if on_single_value == "raise":
            raise single_value(input, real)
        if on_single_value == "skip":
            running_mean = running_var = None
        return _evaluate(input, running_mean, running_var, affine, real, eps, act, own_affine)

    if virtual_batch_size is not None:
        cut = (virtual_batch_size, _number_of_ghosts(input, virtual_batch_size))
        if cut[1] > 1:
            return _train_ghosts(input, running, affine, momentum, eps, real, act, ddof, cut, own_affine)
    undecided = values is None and on_single_value != "raise"
    if own_affine or undecided:
        single = on_single_value if undecided else "raise"
        return _compose(input, running, affine, momentum, eps, real, act, ddof, single, own_affine)
    if _plain_eager():
        if (real is not None and values == 0) or in_backward():
            running = (None, None, None)
        elif num_batches_tracked is not None:
            num_batches_tracked.add_(1 if values is not None or real is None else real.any())
        options = eager.Options(real, running[0], running[1], eps, momentum, running[2], ddof, act)
        return eager.train_step(input, weight, bias, residual, options)
    if exported.exporting() and real is None and running_var is not None and momentum is not None and ddof == 1:
        assert running_mean is not None
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return exported.batch_norm(input, running_mean, running_var, *affine, None, True, momentum, eps, act)
    y, count, mean, var, _, _ = operators().train_forward(input, *affine, real, eps, act)
    averages.update(*running, mean, var, count, momentum, ddof, masked=real is not None)
    return y


Affine = tuple[Tensor | None, Tensor | None, Tensor | None]


def _evaluate(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    affine: Affine,
    mask: Tensor | None,
    eps: float,
    activation: str,
    own_affine: bool,
    inference_weight: float = 0.0,
) -> Tensor:
    """With the running statistics, or where there are none with a mean of 0 and a deviation of 1."""
    plain = not own_affine and inference_weight == 0 and running_mean is not None
    if (
        plain
        and _plain_eager()
        and not (
            torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (input, *affine))
        )
    ):
        return torch.ops.batchnorm.infer(input, running_mean, running_var, *affine, mask, eps, activation)
    if plain and exported.exporting():
        assert running_mean is not None
        assert running_var is not None
        unused = 0.1  # torch's default momentum: the program is that of torch's layer to the letter
        return exported.batch_norm(input, running_mean, running_var, *affine, mask, False, unused, eps, activation)
    mean, var = _population(input, running_mean, running_var, eps)
    if inference_weight:
        mean, var = per_sample.mixed_statistics(operators(), input, mask, mean, var, inference_weight)
    invstd = torch.rsqrt(var + eps)
    if own_affine or inference_weight:
        return per_sample.normalize(operators(), input, mean, invstd, *affine, mask, activation)
    return operators().normalize(input, mean, invstd, *affine, mask, activation)[0]


def _population(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(input.device)
    if running_mean is None or running_var is None:
        zero = torch.zeros(input.size(1), dtype=dtype, device=input.device)
        return zero, zero + (1 - eps)
    # Copies: a later training step moves the buffers in place, and the backward of this call must not notice.
    return running_mean.detach().to(dtype, copy=True), running_var.detach().to(dtype, copy=True)


def _compose(
    input: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    affine: Affine,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    activation: str,
    ddof: int,
    on_single_value: OnSingleValue,
    own_affine: bool,
    part: Part | None = None,
) -> Tensor:
    """A training step out of smaller operators, for what the fused one does not do.

    That is gamma and beta of each sample, the policy for a single value where only the device knows the count, and a
    batch of which input is a part.
    """
    ops = operators()
    if part is None:
        count, mean, m2 = ops.stats(input, mask)
    else:
        count, mean, m2 = part.statistics(ops, input, mask, refuse_single=on_single_value == "raise")
    var = m2 / count.clamp(min=1)
    averaged, mean_used, var_used, shared_by = count, mean, var, count
    if on_single_value != "raise":
        single = count == 1
        population = running[:2] if on_single_value == "running" else (None, None)
        other_mean, other_var = _population(input, *population, eps)
        mean_used, var_used = torch.where(single, other_mean, mean), torch.where(single, other_var, var)
        averaged = torch.where(single, 0, count)
        shared_by = torch.where(single, math.inf, count)
    uncounted = mask is not None or on_single_value != "raise"
    averages.update(*running, mean, var, averaged, momentum, ddof, masked=uncounted)
    invstd = torch.rsqrt(var_used + eps)
    if part is not None and part.fused:
        return part.normalize(input, mean_used, invstd, *affine, mask, activation, shared_by, eps)
    if own_affine:
        return per_sample.normalize(ops, input, mean_used, invstd, *affine, mask, activation)
    return ops.normalize(input, mean_used, invstd, *affine, mask, activation)[0]


def _train_ghosts(
    input: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    affine: Affine,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    activation: str,
    ddof: int,
    cut: tuple[int, int],
    own_affine: bool,
) -> Tensor:
    """Virtual batches; ``cut`` is their size and number."""
    if own_affine:
        saved = ghost.statistics(input, mask, *cut, eps)
        mean, invstd = ghost.of_samples(saved, cut[0], input)
        y = per_sample.normalize(operators(), input, mean, invstd, *affine, mask, activation)
    elif _plain_eager():
        y, saved = eager.ghost_step(input, *affine, eager.GhostOptions(mask, *cut, eps, activation))
    else:
        y, saved, _ = operators().ghost_forward(input, *affine, mask, *cut, eps, activation)
    averages.update_in_order(*running, saved.detach(), momentum, ddof)
    return y


def _number_of_ghosts(x: Tensor, size: int) -> int:
    if size < 1:
        raise InputError(f"expected virtual_batch_size of 1 or more, got {size}")
    if size * math.prod(x.shape[2:]) == 1 and x.size(0) > 0:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got virtual batches of 1 from input size {x.size()}"
        )
    return ghost.number_of(x, size)


def _plain_eager() -> bool:
    """Whether nothing but reverse mode is under way, which is what the quick way serves."""
    return not torch.compiler.is_compiling() and not reference.composing()


def operators() -> Any:
    """The registered operators, or their formulas where only plain torch functions will do."""
    # While torch.compile traces, the operators' own vmap and gradient rules are used.
    return FORMULAS if reference.composing() else torch.ops.batchnorm
