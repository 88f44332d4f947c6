"""Batch normalization that no longer learns: statistics, gamma and beta are constants, in training too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, ShapeError
from batchnorm.ops import functional, jagged
from batchnorm.ops.functional import Activation
from batchnorm.ops.schema import ACTIVATIONS


class FrozenBatchNorm(torch.nn.Module):
    r"""Batch normalization over (N, C, \*spatial) input of any rank, with constant statistics and parameters.

    .. math::
        y = \mathrm{activation}\left(\gamma \frac{x - \mathrm{running\_mean}}{\sqrt{\mathrm{running\_var} + \epsilon}}
            + \beta + \mathrm{residual}\right)

    The same in train and eval: ``train()`` does not unfreeze it (pytorch #86590). gamma and beta are buffers, so that
    no optimizer finds them; the gradient goes through to x and the residual. The keys of the ``state_dict`` are
    torch's, ``num_batches_tracked`` among them, so that a state goes to :class:`torch.nn.BatchNorm2d` and back; a state
    without that key is taken too, which is how torchvision's and detectron2's frozen layers write theirs.

    It is no instance of torch's batch norms: programs that look for those do so to train, synchronise or recalibrate
    them.

    The operator folds statistics and parameters to one scale and one shift a channel, in float64, before it reads x:
    C divisions a call, too few to measure, so nothing is kept that could be out of date when a buffer changes.

    Args:
        num_features: C.
        eps: added to the variance, in units of x squared. 0 is allowed, where no variance is 0.
        affine: have gamma (``weight``) and beta (``bias``) at all; without, they stand for 1 and 0.
        bias: with False, have no beta.
        activation: "relu", "leaky_relu" (slope 0.01), "silu", "gelu" (exact), "hardswish" or None.

    Shape: input and output (N, C, \*spatial); ``mask`` (N, \*spatial); ``lengths`` (N,) for (N, C, L); ``residual`` as
    input.

    Raises:
        InputError: (ValueError) eps out of range, unknown activation.
        ShapeError, DtypeError: the input does not fit, as :func:`batchnorm.nn.functional.batch_norm` in evaluation.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    _ranks: tuple[int, ...] = ()  # any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= eps < float("inf"):
            raise InputError(f"expected eps of 0 or more, got {eps}")
        if activation is not None:
            check_choice("activation", activation, ACTIVATIONS[1:])
        self.num_features, self.eps, self.affine, self.activation = num_features, eps, affine, activation
        options = {"device": device, "dtype": dtype}
        for name, wanted, value in (("weight", affine, torch.ones), ("bias", affine and bias, torch.zeros)):
            if wanted:
                self.register_buffer(name, value(num_features, **options))
            else:
                self.register_parameter(name, None)  # a buffer that is None breaks torch.export
        self.register_buffer("running_mean", torch.zeros(num_features, **options))
        self.register_buffer("running_var", torch.ones(num_features, **options))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def forward(
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """y = activation(gamma * x_hat + beta + residual), with constant gamma, beta and statistics."""
        if self._ranks and input.dim() not in self._ranks:
            raise ShapeError(
                f"expected {' or '.join(f'{rank}D' for rank in self._ranks)} input (got {input.dim()}D input)"
            )
        if not input.is_nested:
            return self._normalize(input, mask, lengths, residual)
        if mask is not None or lengths is not None:
            raise InputError("expected no mask or lengths with a nested input, which has lengths of its own")
        packed = jagged.Packed(input, by_row=False)
        return packed.unpack(
            self._normalize(packed.x, packed.mask, None, None if residual is None else packed.pack(residual))
        )

    def _normalize(self, input: Tensor, mask: Tensor | None, lengths: Tensor | None, residual: Tensor | None) -> Tensor:
        return functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
            mask=mask,
            lengths=lengths,
            residual=residual,
            activation=self.activation,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "num_batches_tracked"
        if key not in state_dict:
            state_dict = {**state_dict, key: torch.zeros_like(self.num_batches_tracked)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The number of channels, eps, and what there is of an activation."""
        base = f"{self.num_features}, eps={self.eps}, affine={self.affine}"
        return base if self.activation is None else f"{base}, activation={self.activation!r}"


class FrozenBatchNorm1d(FrozenBatchNorm):
    """:class:`FrozenBatchNorm` for (N, C) and (N, C, L) input only."""

    _ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """:class:`FrozenBatchNorm` for (N, C, H, W) input only; takes the states of torchvision's layer of this name."""

    _ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """:class:`FrozenBatchNorm` for (N, C, D, H, W) input only."""

    _ranks = (5,)
