"""Well-known architectures, from timm's model code without weights, and trained-like state for them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from oracles.absent_torchvision import stand_in


class Architecture(NamedTuple):
    """A model of timm and the least size of image that it takes well."""

    name: str
    size: int = 96


ARCHITECTURES = (
    *(Architecture("resnet18"), Architecture("seresnet18"), Architecture("skresnet18"), Architecture("resnet26d")),
    *(Architecture("mobilenetv2_050"), Architecture("mobilenetv3_small_050"), Architecture("mnasnet_small")),
    *(Architecture("efficientnet_b0"), Architecture("tinynet_e"), Architecture("mixnet_s"), Architecture("lcnet_050")),
    *(Architecture("densenet121"), Architecture("regnetx_002"), Architecture("regnety_002"), Architecture("dla46_c")),
    *(Architecture("ghostnet_050"), Architecture("hrnet_w18_small"), Architecture("repvgg_a0"), Architecture("dpn48b")),
    *(Architecture("levit_128s", 224), Architecture("ese_vovnet19b_dw"), Architecture("rexnet_100")),
    *(Architecture("mobileone_s0"), Architecture("repghostnet_050"), Architecture("cs3darknet_s")),
    *(Architecture("mobilevit_xxs"), Architecture("efficientformer_l1", 224), Architecture("visformer_tiny", 224)),
    *(
        Architecture("fastvit_t8"),
        Architecture("gernet_s"),
        Architecture("inception_v3"),
        Architecture("res2net50_14w_8s"),
    ),
)
"""Each has batch norm. They take from .03 to .5 s a forward of one image on two cores; inception_v3 is the largest."""


def timm_model(name: str, classes: int = 10, seed: int = 0, **options: object) -> nn.Module:
    """A freshly initialised model of timm; skips the test where timm is not installed."""
    pytest.importorskip("yaml")
    stand_in()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old imports of its own
        timm = pytest.importorskip("timm")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return timm.create_model(name, pretrained=False, num_classes=classes, **options)


def image(architecture: Architecture, n: int = 1, seed: int = 0) -> Tensor:
    """A batch for it, standard normal: (n, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, architecture.size, architecture.size, generator=generator)


@torch.no_grad()
def randomize_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random gammas, betas and running statistics for every batch norm: the defaults 0 and 1 hide errors.

    gammas are between .5 and 1.5, betas normal with deviation .2, running means with deviation .3, running variances
    between .5 and 1.5. For deep models see :func:`trained_like`.
    """
    generator = torch.Generator().manual_seed(seed)
    for norm in _norms(model):
        if norm.weight is not None:
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        if norm.bias is not None:
            norm.bias.copy_(0.2 * torch.randn(norm.num_features, generator=generator))
        if norm.running_mean is not None:
            norm.running_mean.copy_(0.3 * torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.num_batches_tracked.fill_(100)
    return model


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def trained_like(architecture: Architecture, seed: int = 0) -> nn.Module:
    """A model of the zoo in eval mode, with random gammas and betas and running statistics such as training leaves.

    They are those of random images, so that activations stay finite through any depth, off by a tenth of a deviation.
    """
    model = randomize_statistics(timm_model(architecture.name, seed=seed), seed)
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model(image(architecture, 2, seed))
    generator = torch.Generator().manual_seed(seed)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_mean is not None:
            deviation = norm.running_var.sqrt()
            norm.running_mean.add_(0.1 * deviation * torch.randn(norm.num_features, generator=generator))
            norm.running_var.mul_(0.8 + 0.4 * torch.rand(norm.num_features, generator=generator)).add_(1e-3)
    return model.eval()
