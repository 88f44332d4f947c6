"""Files of weights: read without running code from them, and written back in the shape they came in."""

from __future__ import annotations

import copy
import os
import pickle
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import CheckpointError, OutputError
from batchnorm.nn.recognition import unwrapped

_NAMES = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "weights", "params", "module")
"""Under which training scripts keep a model's state, the most usual first."""

_PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model._orig_mod.",
)
"""What wrappers put before a model's keys: parallel ones and averages, torch.compile, Lightning modules."""

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})

_OF_WRAPPERS = frozenset({"n_averaged"})
"""Keys that belong to a wrapper: ``torch.optim.swa_utils.AveragedModel`` counts in one."""


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights.

    Attributes:
        path: where it came from.
        document: all that it holds: the state itself, or a dictionary with an optimizer's and so on beside it.
        place: the keys in ``document`` under which the state is; empty where it is the document itself.
        metadata: of a safetensors file.
    """

    path: Path
    document: Any
    place: tuple[str, ...]
    metadata: dict[str, str] | None = None

    @property
    def state(self) -> Mapping[str, Any]:
        """The model's state."""
        found = self.document
        for key in self.place:
            found = found[key]
        assert isinstance(found, Mapping)
        return found


def read_checkpoint(path: str | PathLike[str], key: str | None = None) -> Checkpoint:
    """Read a safetensors file, or one of ``torch.save``, of which only tensors and plain types are taken.

    Args:
        path: the file; what ends in ``.safetensors`` is read as that.
        key: where in the file the state is, parted by dots: ``"state_dict_ema"``. Without it, the file itself or the
            first of the usual names (state_dict, model_state_dict, model, ...).

    Raises:
        CheckpointError: (ValueError) it cannot be read, holds code, or no state is found where it is looked for.
    """
    source = Path(path)
    metadata = None
    try:
        if source.suffix == ".safetensors":
            document, metadata = _read_safetensors(source)
        else:
            document = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(source)!r}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if re.search(r"Unsupported (global|class)|GLOBAL", str(error)):  # anything else is no pickle of torch's at all
            raise CheckpointError(
                f"{str(source)!r} holds more than tensors and plain types, which could run code when it is read: "
                "save the model's state_dict() by itself"
            ) from error
        raise CheckpointError(f"{str(source)!r} is damaged or no file of weights: {_line(error)}") from error
    except Exception as error:
        raise CheckpointError(f"{str(source)!r} is damaged or no file of weights: {_line(error)}") from error
    return Checkpoint(source, document, _place(document, key, source), metadata)


def load_into(model: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> str:
    """Load the weights; the prefix that wrappers put before the model's keys is taken off, and returned.

    A tensor that the model has under several names may be in the file under one of them, as safetensors' ``save_model``
    writes it, and the counters of batches may be missing, as in files from before torch had them and in ported ones.
    torch.compile and parallel wrappers around the model, too, make no difference.

    Raises:
        CheckpointError: (ValueError) keys are missing or left over, unless ``strict`` is False, or shapes differ; the
            model is as it was.
    """
    model = unwrapped(model)[0]
    state, prefix = _without_prefix(model, checkpoint.state)
    own = model.state_dict(keep_vars=True)
    given = {id(own[key]) for key in state if key in own}
    missing = [key for key in own if key not in state and id(own[key]) not in given and not _is_counter(key)]
    foreign = [key for key in state if key not in own]
    if strict and missing and not foreign and all(key.rpartition(".")[2] in _STATISTICS for key in missing):
        raise CheckpointError(
            f"{str(checkpoint.path)!r} lacks running statistics ({_some('missing', missing)}), as weights do that were "
            "averaged or saved without buffers: load it in the factory, with strict=False, and recalibrate"
        )
    if strict and (missing or foreign):
        raise CheckpointError(
            f"{str(checkpoint.path)!r} does not belong to this model: "
            f"{_some('missing', missing)}{', ' if missing and foreign else ''}{_some('not in the model', foreign)}"
        )
    if not strict and not any(key in own for key in state):
        raise CheckpointError(f"{str(checkpoint.path)!r} has no key of this model: {_some('it has', foreign)}")
    for key, tensor in state.items():
        if key in own and isinstance(tensor, Tensor) and tensor.shape != own[key].shape:
            raise CheckpointError(
                f"{str(checkpoint.path)!r} does not belong to this model: {key} is {tuple(tensor.shape)}, "
                f"the model's is {tuple(own[key].shape)}"
            )
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    return prefix


def updated(checkpoint: Checkpoint, model: nn.Module, prefix: str) -> Checkpoint:
    """The checkpoint with the model's values in place of its own, for each key that it has; types stay as they were.

    What the model has as it was loaded stays to the bit, though the model's type may be a coarser one.
    """
    document = _copied(checkpoint.document)
    state = document
    for key in checkpoint.place:
        state = state[key]
    for key, value in unwrapped(model)[0].state_dict().items():
        old = state.get(prefix + key)
        if not isinstance(old, Tensor) or not isinstance(value, Tensor):
            continue
        if not torch.equal(old.to(value), value):
            state[prefix + key] = value.detach().to(device="cpu", dtype=old.dtype)
    return Checkpoint(checkpoint.path, document, checkpoint.place, checkpoint.metadata)


def write_checkpoint(checkpoint: Checkpoint, path: str | PathLike[str]) -> None:
    """Write it beside ``path`` and rename it when whole; safetensors where the name ends so, else ``torch.save``.

    Raises:
        CheckpointError: (ValueError) the document holds more than tensors, and safetensors cannot keep that.
        OutputError: (OSError) the place cannot be written.
    """
    target = Path(path)
    if target.suffix == ".safetensors" and checkpoint.place:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} holds more than a state, which {str(target)!r} cannot keep: name a .pt file"
        )
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            tensors = {key: value.contiguous().clone() for key, value in checkpoint.state.items()}
            save_file(tensors, partial, metadata=checkpoint.metadata)
        else:
            torch.save(checkpoint.document, partial)
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _line(error)
        raise OutputError(f"cannot write the weights to {str(target)!r}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def _read_safetensors(source: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping


def _place(document: Any, key: str | None, source: Path) -> tuple[str, ...]:
    if key is not None:
        found, place = document, tuple(key.split("."))
        for name in place:
            if not isinstance(found, Mapping) or name not in found:
                raise CheckpointError(f"{str(source)!r} has no {key!r}: it has {_keys(document)}")
            found = found[name]
        if not _is_state(found):
            raise CheckpointError(f"{str(source)!r} has no state of a model at {key!r}")
        return place
    if _is_state(document):
        return ()
    if isinstance(document, Mapping):
        for name in _NAMES:
            if name in document and _is_state(document[name]):
                return (name,)
    raise CheckpointError(f"{str(source)!r} has no state of a model that can be found: it has {_keys(document)}")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _without_prefix(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    own = set(model.state_dict())
    prefix = max(_PREFIXES, key=lambda prefix: sum(prefix + key in state for key in own))
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not (prefix == "" and key in _OF_WRAPPERS and key not in own)
    }, prefix


def _copied(document: Any) -> Any:
    """The same tensors in other dictionaries."""
    if isinstance(document, dict):
        made = copy.copy(document)
        for key, value in document.items():
            made[key] = _copied(value)
        return made
    return document


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _some(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}"


def _keys(document: Any) -> str:
    if not isinstance(document, Mapping):
        return f"a {type(document).__name__}"
    return ", ".join(repr(key) for key in list(document)[:8]) or "nothing"


def _line(error: BaseException) -> str:
    said = " ".join(str(error).split("\n")[0].split())
    # A KeyError says its key and nothing more.
    return f"{type(error).__name__} {said}".strip() if isinstance(error, LookupError) or not said else said
