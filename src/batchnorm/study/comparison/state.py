"""A run in the middle, as a file: model, optimizer, random numbers, place in the data, and what was measured so far.

One safetensors file a trajectory (variant, rate and seed), written beside its target and renamed over it: whatever
kills a run leaves the last whole one. No pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from batchnorm.study.records import Record, write_whole


@dataclass
class Progress:
    """How far a trajectory is.

    ``run`` is the run that the lines belong to, ``best`` the best validation so far with its step and the test's value
    there (None: not looked at).
    """

    run: str
    step: int = 0
    seconds: float = 0.0
    lines: list[Record] = field(default_factory=list)
    best: tuple[float, int, float | None] | None = None


def path_of(folder: Path, variant: str, lr: float, seed: int) -> Path:
    """The file of a trajectory."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', variant)}_lr{lr:g}_seed{seed}.safetensors"


def save(path: Path, progress: Progress, model: nn.Module, optimizer: Any, scale: Any, device: str) -> bool:
    """Write a trajectory; False where the optimizer holds what no file of tensors can.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in model.state_dict().items()}
    plain: dict[str, Any] = {}
    state = optimizer.state_dict()
    for name, value in _flat(state, "optimizer"):
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            plain[name] = value
        else:
            return False
    tensors["random/cpu"] = torch.get_rng_state()
    if device.startswith("cuda"):
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    head = {"progress": vars(progress), "plain": plain, "scale": scale.state_dict()}
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items() if _is_tensor(value)}
    write_whole(path, safetensors.torch.save(whole, {"batchnorm": json.dumps(head)}))
    return True


def load(path: Path, model: nn.Module, optimizer: Any, scale: Any, device: str) -> Progress | None:
    """Put a trajectory back where it was; None where there is no whole file of it (then it begins anew)."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            head = json.loads(file.metadata()["batchnorm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
    model.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    known = {**{k: v for k, v in tensors.items() if k.startswith("optimizer/")}, **head["plain"]}
    state = optimizer.state_dict()
    for name, value in known.items():
        parts = name.split("/")
        if parts[1] == "state":
            state["state"].setdefault(int(parts[2]), {})[parts[3]] = value
        elif parts[3] != "params":
            state["param_groups"][int(parts[2])][parts[3]] = value
    optimizer.load_state_dict(state)
    scale.load_state_dict(head["scale"])
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    progress = Progress(**head["progress"])
    progress.best = None if progress.best is None else tuple(progress.best)  # type: ignore[assignment]
    return progress


def _flat(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for number, entries in state["state"].items():
        for key, value in entries.items():
            yield f"{prefix}/state/{number}/{key}", value
    for number, group in enumerate(state["param_groups"]):
        for key, value in group.items():
            # Which parameters a group holds is known from the model; betas and the like never change.
            if not isinstance(value, list | tuple):
                yield f"{prefix}/group/{number}/{key}", value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
