"""From what a user has to the data of a comparison: loaders, arrays, or files (see ``files``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.study.comparison.data import PARTS, ArrayData, Data, LoaderData
from batchnorm.study.comparison.objective import task_of

SHARES = (0.6, 0.2, 0.2)
FEWEST_TEST = 20
"""Test samples below which a comparison is refused: one of them would be more than five points."""
# Whole numbers are classes where there are few of them, each with enough samples; else they are quantities.
_FEW_CLASSES, _EACH, _MOST_CLASSES = 20, 5, 1000


def open_data(
    data: Any,
    *,
    batch_size: int = 64,
    target: str | None = None,
    columns: Sequence[str] | None = None,
    lengths: str | None = None,
    task: str | None = None,
    standardize: bool | None = None,
    image_size: int | None = None,
) -> Data:
    """``data`` as :func:`batchnorm.compare` takes it.

    Raises:
        InputError: it is none of what can be compared on, or too small.
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, str | PathLike):
        from batchnorm.study.comparison.files import open_file

        return open_file(
            str(data),
            batch_size=batch_size,
            target=target,
            columns=columns,
            lengths=lengths,
            task=task,
            standardize=True if standardize is None else standardize,
            image_size=image_size,
        )
    if isinstance(data, Mapping):
        data = [data[name] for name in PARTS if name in data]
    if not isinstance(data, tuple | list) or not data:
        raise InputError(
            f"expected data as loaders (train, validation, test), arrays (X, y) or a path, got a {type(data).__name__}"
        )
    if not all(hasattr(item, "shape") for item in data):
        if any(hasattr(item, "shape") for item in data):
            raise InputError("expected data as loaders, or as arrays (X, y), got some of each")
        return LoaderData(data)
    if len(data) not in (2, 3):
        raise InputError(f"expected arrays as (X, y) or (X, lengths, y), got {len(data)} of them")
    *inputs, goal = (_tensor(item) for item in data)
    notes: list[str] = []
    if standardize:
        raise InputError("expected standardize= with a path alone: arrays are taken as they are")
    return of_arrays(tuple(inputs), goal, batch_size, "the arrays", "y", task, notes)


def of_arrays(
    inputs: tuple[Tensor, ...],
    target: Tensor,
    batch_size: int,
    label: str,
    name: str,
    task: str | None,
    notes: list[str],
    parts: Mapping[str, Tensor] | None = None,
) -> ArrayData:
    """Tensors as data: the task is told from the target, and the parts are drawn.

    Raises:
        InputError: lengths that differ, or too few samples.
    """
    sizes = [len(tensor) for tensor in (*inputs, target)]
    if len(set(sizes)) != 1:
        raise InputError(f"{label}: expected as many targets as samples, got {' and '.join(map(str, sizes))}")
    target, task, classes, why = decide(target, task, name)
    notes.append(why)
    if parts is None:
        parts = split(target, classes, label)
        shares = ", ".join(f"{len(parts[part])} for {what}" for part, what in zip(PARTS, _USES, strict=True))
        how = "with the classes in proportion" if classes else "at random"
        notes.append(f"The samples are split once, {how}: {shares}.")
    check_parts(parts, label)
    return ArrayData(inputs, target, parts, batch_size, label=label, notes=notes, task=task, classes=classes)


_USES = ("training", "validation (curves, rates)", "the test (verdict)")


def decide(target: Tensor, task: str | None, name: str) -> tuple[Tensor, str, int, str]:
    """The target as it is trained on, its task, classes, and why.

    Raises:
        InputError: classes that are no whole numbers.
    """
    values = target.double()
    if not values.isfinite().all():
        raise InputError(f"expected finite targets in {name}, got {int((~values.isfinite()).sum())} NaN or inf")
    whole = bool((values == values.round()).all()) and target.dim() == 1
    distinct = target.unique() if whole else None
    if task is None:
        few = distinct is not None and (
            len(distinct) <= _FEW_CLASSES or (len(distinct) <= _MOST_CLASSES and len(target) >= 50 * len(distinct))
        )
        task = "classification" if few and distinct is not None else "regression"
        if distinct is not None:
            told = f"{name} has {len(distinct)} different values, all whole numbers or names"
            why = f"{told}: {task}, by {'cross-entropy' if few else 'mean squared error'} (task= says otherwise)."
        else:
            why = f"{name} holds numbers that are not whole: regression, by mean squared error."
    else:
        why = f"{task}, as asked for."
    if task == "regression":
        return target.float(), task, 0, why
    if distinct is None:
        raise InputError(f"expected classes as whole numbers in {name}, got others: leave task= to be told")
    # 1, 2, 3 are the classes 0, 1, 2.
    return torch.searchsorted(distinct, target).long(), task, max(len(distinct), 2), why


def split(target: Tensor, classes: int, label: str, seed: int = 0) -> dict[str, Tensor]:
    """60% training, 20% validation, 20% test, stratified where every class is large enough."""
    if len(target) < FEWEST_TEST / SHARES[2]:
        raise too_few(len(target) // 5, label)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    if classes and int(torch.bincount(target).min()) >= _EACH:
        # By class, in chance order within each: then every fifth sample takes its share of each class along.
        order = order[torch.argsort(target[order], stable=True)]
    fifth = torch.arange(len(order)) % 5
    chosen = (order[fifth < 3], order[fifth == 3], order[fifth == 4])
    return {name: part.sort().values for name, part in zip(PARTS, chosen, strict=True)}


def check_parts(parts: Mapping[str, Tensor], label: str) -> None:
    """Raise where the test part is too small to say anything."""
    if len(parts["test"]) < FEWEST_TEST:
        raise too_few(len(parts["test"]), label)


def too_few(found: int, label: str) -> InputError:
    """The error for a test part that is too small."""
    return InputError(
        f"{label}: expected {FEWEST_TEST} test samples or more, got {found}, each of which would be "
        f"{100 / max(found, 1):.0f}% of the result: give {int(FEWEST_TEST / SHARES[2])} samples or more in all"
    )


def classes_of(data: Data) -> tuple[str, int, str]:
    """Task, classes and why, of data whose loaders know better than we what they hold."""
    if data.task:
        return data.task, data.classes, ""
    train = [batch.target for _, batch in zip(range(50), data.stream(0), strict=False)]
    held = [batch.target for name in PARTS[1:] for batch in data.part(name)]
    targets = torch.cat([target.reshape(-1) for target in (*train, *held)])
    return task_of(targets, f"the target of {data.label}")


def check_loaded(data: Data) -> None:
    """Raise where a loader's test part is too small."""
    if data.samples()[-1] < FEWEST_TEST:
        found = data.samples()[-1]
        raise InputError(
            f"{data.label}: expected {FEWEST_TEST} test samples or more, got {found}: give the last loader more"
        )


def _tensor(item: Any) -> Tensor:
    if isinstance(item, Tensor):
        found = item.detach().cpu()
    else:
        values = np.asarray(item)
        if values.dtype.kind in "OUS":
            _, values = np.unique(values.astype(str), return_inverse=True)
        found = torch.as_tensor(np.ascontiguousarray(values))
    return found.float() if found.dtype == torch.float64 else found
