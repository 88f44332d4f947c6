"""What may stand between two layers, by class and by the name of its function, for rules that look upstream."""

from __future__ import annotations

from torch import nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MIXING = (nn.Linear, *CONVOLUTIONS)
"""Sums over the channels or units that they read."""
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUT_FUNCTIONS = frozenset(("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"))
ADDITIONS = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__", "iadd", "sum"))
ACTIVATIONS = (
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "silu_"),
    *("hardswish", "tanh", "sigmoid", "mish"),
)
PASSED_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardsigmoid),
)
"""Work by element, or move elements about; with them, pooling."""
PASSED_FUNCTIONS = frozenset(
    (
        *ACTIVATIONS,
        *("cat", "concat", "getitem", "__getitem__", "split", "chunk", "flatten", "reshape", "view", "permute"),
        *("transpose", "squeeze", "unsqueeze", "contiguous", "clone", "float", "half", "to", "mean", "interpolate"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
        *("adaptive_avg_pool2d", "adaptive_max_pool2d", "boolean_dispatch", "pad"),
        *("linear", "conv1d", "conv2d", "conv3d"),
    )
)
