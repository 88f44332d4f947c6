"""What the doctor says about well-known architectures, fresh and trained: its false alarms are to be seen here.

Each model of the zoo (timm's code, no weights) is examined as it is made, in train and in eval mode, with an example;
and after it has been trained on scikit-learn's digits (enlarged, three channels alike) for two epochs, in eval mode,
with 10 of its training batches and its optimizer, which spares gamma and beta its weight decay as is usual. A row tells
the codes and how many layers each was found at. Nothing is timed against anything: seconds are of one diagnosis.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
from benchmarks import harness
from benchmarks.harness import save, show

BATCH = 32
STEPS = 94
QUICK_STEPS = 30
SMALLEST = 32
LEAST_FOR = {"levit_128s": 224, "efficientformer_l1": 224, "visformer_tiny": 224, "inception_v3": 96}
"""Images that a model cannot do without."""
TRAINED = frozenset(
    [
        "resnet18",
        "seresnet18",
        "skresnet18",
        "resnet26d",
        "mobilenetv2_050",
        "mobilenetv3_small_050",
        "mnasnet_small",
        "tinynet_e",
        "lcnet_050",
        "densenet121",
        "regnetx_002",
        "dla46_c",
        "ghostnet_050",
        "repvgg_a0",
        "ese_vovnet19b_dw",
        "gernet_s",
        "cs3darknet_s",
    ]
)
"""Those that train in seconds on two cores; the others are examined fresh only."""


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from oracles.model_zoo import ARCHITECTURES, timm_model

    images, labels = _digits()
    rows: list[dict[str, Any]] = []
    for architecture in ARCHITECTURES[:3] if harness.options.quick else ARCHITECTURES:
        size = LEAST_FOR.get(architecture.name, SMALLEST)
        model = timm_model(architecture.name)
        example = _sized(images[:4], size)
        rows += [
            _row(architecture.name, "fresh, train", model.train(), example=example),
            _row(architecture.name, "fresh, eval", model.eval(), example=example),
        ]
        if architecture.name not in TRAINED:
            continue
        optimizer, accuracy = _train(model, images, labels, size)
        batches = [_sized(images[k * BATCH : (k + 1) * BATCH], size) for k in range(10)]
        rows.append(_row(architecture.name, "trained, eval", model.eval(), accuracy, batches, optimizer=optimizer))
        print(*rows[-1].values())  # the table comes after minutes
    show("What the doctor finds, and at how many layers", rows)
    save("doctor", rows, steps=STEPS, batch=BATCH)


def _row(
    name: str, state: str, model: nn.Module, accuracy: float | None = None, *data: Any, **more: Any
) -> dict[str, Any]:
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bn.diagnose(model, *data, **more)
    codes = Counter((finding.code, finding.severity) for finding in found)
    told = ", ".join(f"{code} {severity} x{count}" for (code, severity), count in sorted(codes.items()))
    return {
        "model": name,
        "state": state,
        "layers": found.layers,
        "accuracy": accuracy,
        "found": told or "nothing",
        "seconds": time.perf_counter() - began,
    }


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None]
    images = (images - images.mean()) / images.std()
    return images.expand(-1, 3, -1, -1), torch.tensor(digits.target)[order]


def _sized(images: Tensor, size: int) -> Tensor:
    return nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _train(model: nn.Module, images: Tensor, labels: Tensor, size: int) -> tuple[torch.optim.Optimizer, float]:
    """SGD with momentum on 1500 images, its rate falling to 0; the optimizer, and the accuracy on the other images."""
    thick = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    thin = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": thick, "weight_decay": 1e-4}, {"params": thin, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model.train()
    steps = QUICK_STEPS if harness.options.quick else STEPS
    # To 0 in the end, as models are trained: at a constant rate the running statistics lag behind weights that move.
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        chosen = torch.randint(1500, (BATCH,), generator=generator)
        optimizer.zero_grad()
        logits = model(_sized(images[chosen], size))
        logits = logits[0] if isinstance(logits, tuple) else logits
        nn.functional.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        decay.step()
    model.eval()
    with torch.no_grad():
        parts = [model(_sized(part, size)).argmax(1) for part in images[1500:].split(BATCH)]
    return optimizer, (torch.cat(parts) == labels[1500:]).double().mean().item()
