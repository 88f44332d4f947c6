"""Batch normalization that also takes out the correlation between channels: DBN and IterNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm._checks import check_choice
from batchnorm._errors import InputError, ShapeError
from batchnorm.nn.batch_norm import Averages, _BatchNormLayer
from batchnorm.ops import whitening
from batchnorm.ops.activations import activation_layer
from batchnorm.ops.arguments import check_eps, check_input, check_residual
from batchnorm.ops.functional import Activation, OnSingleValue
from batchnorm.ops.roots import Eigen, Newton, Root, tolerance
from batchnorm.ops.whitening import Plan


class _WhiteningLayer(_BatchNormLayer):
    """What the layers share: a running covariance (g, G, G) in the place of a running variance."""

    running_cov: Tensor | None

    def __init__(
        self,
        num_features: int,
        group_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        decay: float | None = None,
        ddof: int = 1,
        on_single_value: OnSingleValue = "raise",
    ) -> None:
        check_group_size(num_features, group_size)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            decay=decay,
            ddof=ddof,
            on_single_value=on_single_value,
        )
        self.group_size = group_size
        # No layer of this kind has a running variance: a program that folds or converts batch norm by its running
        # variance would go wrong without a word, and so fails.
        del self._buffers["running_var"]
        num_batches = self._buffers.pop("num_batches_tracked")
        cov = None
        if track_running_stats:
            shape = (num_features // group_size, group_size, group_size)
            cov = torch.eye(group_size, device=device, dtype=dtype).expand(shape).clone()
        self.register_buffer("running_cov", cov)
        self.register_buffer("num_batches_tracked", num_batches)

    def reset_running_stats(self) -> None:
        """Running mean 0, running covariance the identity, no batches counted."""
        cov = self._buffers.get("running_cov")
        if not self.track_running_stats or cov is None:
            return
        assert self.running_mean is not None
        assert self.num_batches_tracked is not None
        self.running_mean.zero_()
        cov.copy_(torch.eye(self.group_size, device=cov.device, dtype=cov.dtype).expand(cov.shape))
        self.num_batches_tracked.zero_()

    @torch.no_grad()
    def whitening_matrix(self) -> Tensor:
        """The population's W (g, G, G), in float64: eval computes gamma W (x - running_mean) + beta with it.

        Raises:
            InputError: (ValueError) the layer has no running statistics.
        """
        return self._population(self._known_cov()).matrix

    def _known_cov(self) -> Tensor:
        if self.running_cov is None:
            raise InputError("expected running statistics, got a layer made with track_running_stats=False")
        return self.running_cov

    @torch.no_grad()
    def to_affine(self, spatial_dims: int) -> torch.nn.Module:
        """What eval computes, of plain layers with the numbers of now: y = activation(gamma W x + offset).

        For deployment: a 1 x 1 convolution with a group for each group of channels, or for ``spatial_dims=0`` ((N, C)
        input) a linear layer, and the activation after it. ONNX has no eigenvalues, so :class:`DecorrelatedBatchNorm`
        is exported this way; quantizers know these layers. Of the dtype and device of the running statistics.

        Args:
            spatial_dims: of the input: 0 for (N, C), 1 for (N, C, L), 2 for (N, C, H, W), 3 for (N, C, D, H, W).

        Raises:
            InputError: (ValueError) another number of dimensions, or the layer has no running statistics.
        """
        check_choice("spatial_dims", spatial_dims, (0, 1, 2, 3))
        cov = self._known_cov()
        given = self._population(cov)
        wide = given.mean.dtype
        matrix = given.matrix
        if self.weight is not None:
            matrix = self.weight.to(wide).reshape(-1, self.group_size, 1) * matrix
        offset = -(matrix @ given.mean.reshape(-1, self.group_size, 1)).flatten()
        if self.bias is not None:
            offset = offset + self.bias.to(wide)
        options: dict[str, Any] = {"device": cov.device, "dtype": cov.dtype}
        channels = self.num_features
        layer: torch.nn.Module
        if spatial_dims == 0:
            layer, weight = torch.nn.Linear(channels, channels, **options), torch.block_diag(*matrix)
        else:
            kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[spatial_dims - 1]
            layer = kind(channels, channels, 1, groups=matrix.size(0), **options)
            weight = matrix.reshape(channels, self.group_size, *[1] * spatial_dims)
        layer.weight.copy_(weight)
        assert layer.bias is not None
        layer.bias.copy_(offset)
        return layer if self.activation is None else torch.nn.Sequential(layer, activation_layer(self.activation))

    def _root(self, dtype: torch.dtype) -> Root:
        """How W is found of a covariance that was computed, or kept, in this dtype."""
        raise NotImplementedError

    def _plan(self, dtype: torch.dtype, mask: Tensor | None = None) -> Plan:
        # A covariance of half precision data is computed in float32.
        return Plan(self.group_size, self._root(torch.promote_types(dtype, torch.float32)), mask)

    def _population(self, like: Tensor) -> whitening.Given:
        mean, cov = self.running_mean, self.running_cov
        assert mean is not None
        assert cov is not None
        # Its own dtype, be it a half: what was rounded to it says nothing of small eigenvalues.
        return whitening.population(like, mean, cov, Plan(self.group_size, self._root(cov.dtype)))

    def _normalize_by_batch(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        self._check(input, weight, bias, training=True)
        if residual is not None:
            residual = check_residual(input, residual)
        running, momentum = self._averages(), self.momentum
        if running.mean is None and self.on_single_value == "running":
            running, momentum = Averages(self.running_mean, self.running_cov, None), 0.0  # to be used, not to be moved
        return whitening.batch_whitening(
            input,
            running,
            (weight, bias, residual),
            self._plan(input.dtype, mask),
            momentum=momentum,
            ddof=self.ddof,
            activation=self.activation or "none",
            on_single_value=self.on_single_value,
        )

    def _normalize_by_running(
        self, input: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        self._check(input, weight, bias, training=False)
        if residual is not None:
            residual = check_residual(input, residual)
        plan = self._plan(input.dtype, mask)._replace(given=self._population(input))
        return whitening.whiten(input, weight, bias, residual, plan, self.activation or "none")[0]

    def _averages(self) -> Averages:
        if not self.training or not self.track_running_stats:
            return Averages(None, None, None)
        return Averages(self.running_mean, self.running_cov, self.num_batches_tracked)

    def _check(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, *, training: bool) -> None:
        if input.size(1) != self.num_features:
            raise ShapeError(f"expected an input with {self.num_features} channels, got {list(input.shape)}")
        # The mean stands for the covariance too: what there is to say of one holds for the other.
        mean = self.running_mean
        check_input(input, mean, mean, weight, bias, training or mean is None)
        check_eps(self.eps, training)

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.dim() <= 5:
            raise ShapeError(f"expected 2D to 5D input (got {input.dim()}D input)")

    def extra_repr(self) -> str:
        """Torch's, the group size, and what differs from the defaults."""
        first, rest = super().extra_repr().split(", ", 1)
        return f"{first}, group_size={self.group_size}, {rest}"


class DecorrelatedBatchNorm(_WhiteningLayer):
    r"""Whitening over the batch, per group of channels, by eigenvalues: each group comes out with covariance I.

    .. math::
        \hat{x} = W (x - \mathrm{mean}), \quad W = U (\Lambda + \epsilon)^{-1/2} U^T, \quad S = U \Lambda U^T, \quad
        y = \mathrm{activation}(\gamma \hat{x} + \beta + \mathrm{residual})

    with mean and biased covariance S of a group's channels over batch and positions. W is the symmetric, or ZCA, form
    of whitening, the one that moves x least. In training S is the batch's and the gradient goes through it; running
    mean and running covariance (``running_cov``, (groups, G, G), with Bessel's correction for ``ddof=1``) move towards
    the batch's. In eval W is made of the running covariance, anew at each call. With ``group_size=1`` it is batch norm.

    A direction in which a group's variance is at most ``4 sqrt(G) eps`` of its largest has no variance and is dropped:
    its x_hat is 0, in eval too, and it is never amplified. This eps is that of the dtype in which the covariance was
    computed, float32 at least (1.9e-6 of the largest for G = 16), or in eval is kept. So a group of more channels than
    values is fine, and a constant channel gives beta. Where batch norm in eval would divide by sqrt(``eps``) what a
    constant channel shows anew, this layer shows nothing.

    The gradient is that of W itself, not of eigenvectors: finite and right where eigenvalues coincide. It can be
    differentiated twice more; what is dropped counts as variance 0 in it.

    Statistics: the mean is float64; products of the centred values are float32 for large float32 or narrower tensors,
    else float64; sums over blocks and everything on covariances is float64.

    Args:
        num_features: C.
        group_size: G, which divides C; a group is G adjacent channels. Cost and the number of values that a covariance
            needs grow with it.
        eps: added to the variance of each direction, in units of x squared.
        momentum, affine, track_running_stats, bias, activation, decay, ddof, on_single_value: as
            :class:`batchnorm.nn.BatchNorm1d`.

    Shape: input and output (N, C, \*spatial) with 0 to 3 spatial dimensions; ``mask`` (N, \*spatial); ``lengths`` (N,)
    for (N, C, L); ``residual`` as input.

    Raises:
        ShapeError, InputError, DtypeError: as :class:`batchnorm.nn.BatchNorm1d`; InputError also where group_size does
            not divide num_features.

    An instance of torch's batch norm, so that programs keep its parameters out of weight decay, but without
    ``running_var``: those that fold or convert by it fail instead of going wrong.

    Source: Huang, Yang, Lang & Deng (2018), "Decorrelated Batch Normalization", algorithms 1 and 2. Differences: the
    running covariance instead of a running W, whose average is not the W of an average; the tolerance; the form of the
    gradient, which the paper divides by differences of eigenvalues.
    """

    def _root(self, dtype: torch.dtype) -> Root:
        return Eigen(self.eps, tolerance(self.group_size, dtype))


class IterNorm(_WhiteningLayer):
    r"""Whitening over the batch, per group of channels, by Newton's iteration: nearly as white, without eigenvalues.

    .. math::
        S_N = \frac{S + \epsilon I}{\mathrm{tr}(S + \epsilon I)}, \quad P_0 = I, \quad
        P_{k+1} = \tfrac{1}{2} (3 P_k - P_k^3 S_N), \quad W = P_T / \sqrt{\mathrm{tr}(S + \epsilon I)}

    and the rest as :class:`DecorrelatedBatchNorm`. In exact arithmetic W tends to (S + eps I)^(-1/2) with the
    iterations, for every covariance. How far it comes in T iterations depends on a direction's share s of the group's
    variance (tr S): it is multiplied by no more than ``1.5^T / sqrt(tr)``, so that a direction with ``s < 1.5^(-2T)``,
    for the default 5 iterations less than 1/58, stays below unit variance, and one without variance stays small. That
    is the tolerance of this layer. For a small group of channels of similar variance 5 iterations are near the limit;
    larger or more correlated groups stay less white, which the paper uses as a dial. The iteration is computed in a
    form that does not diverge with many iterations or ill-conditioned covariances, as the formula above does.

    Differentiable to any order.

    Args:
        num_iterations: T, 0 or more. With 0 a group is centred and divided by the root of its total variance.

    See :class:`DecorrelatedBatchNorm` for the other arguments, shapes and errors.

    Source: Huang, Zhou, Zhu, Liu & Shao (2019), "Iterative Normalization: Beyond Standardization towards Efficient
    Whitening", algorithm 1. Difference: the running covariance instead of a running W.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int,
        num_iterations: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: Activation | None = None,
        decay: float | None = None,
        ddof: int = 1,
        on_single_value: OnSingleValue = "raise",
    ) -> None:
        if num_iterations < 0:
            raise InputError(f"expected num_iterations of 0 or more, got {num_iterations}")
        super().__init__(
            num_features,
            group_size,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            decay=decay,
            ddof=ddof,
            on_single_value=on_single_value,
        )
        self.num_iterations = num_iterations

    def _root(self, dtype: torch.dtype) -> Root:  # noqa: ARG002
        return Newton(self.eps, self.num_iterations)

    def extra_repr(self) -> str:
        """Torch's, and what differs from the defaults."""
        return f"{super().extra_repr()}, num_iterations={self.num_iterations}"


def check_group_size(num_features: int, group_size: int) -> None:
    """Raise unless the channels fall into groups of this size."""
    if group_size < 1 or num_features % group_size:
        sizes = [size for size in range(1, num_features + 1) if num_features % size == 0]
        raise InputError(
            f"expected group_size to divide num_features={num_features}, got {group_size}: "
            f"take one of {', '.join(map(str, sizes))}"
        )
