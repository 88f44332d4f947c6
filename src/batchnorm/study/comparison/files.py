"""Files as the data of a comparison: tables with a target column, arrays with a target array, folders of images."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm._errors import InputError
from batchnorm.preprocessing.sources import open_source
from batchnorm.preprocessing.sources.columns import listed
from batchnorm.preprocessing.sources.files import need
from batchnorm.preprocessing.sources.paths import find_files
from batchnorm.preprocessing.sources.tables import list_item, number_type
from batchnorm.study.comparison import opening
from batchnorm.study.comparison.data import PARTS, ArrayData

# Names of folders that hold the parts of a set of images.
_FOLDERS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}
# Images of different sizes are brought to their median, but to no more than this: a comparison is no training run.
_LARGEST_SIDE = 64


def open_file(
    path: str,
    *,
    batch_size: int,
    target: str | None,
    columns: Sequence[str] | None,
    lengths: str | None,
    task: str | None,
    standardize: bool,
    image_size: int | None,
) -> ArrayData:
    """A path as data.

    Raises:
        InputError: it cannot be read, has no such target, or holds too little.
        MissingDependencyError: pyarrow or Pillow is needed and not installed.
    """
    label, files, kind = find_files(path)
    if kind == "image":
        _refuse("a folder of images", target=target, columns=columns, lengths=lengths)
        return _images(path, files, batch_size, image_size, standardize)
    notes: list[str] = []
    if kind in ("csv", "parquet", "arrow"):
        _refuse("a table", lengths=lengths, image_size=image_size)
        features, goal = _table(label, files, kind, target, columns, notes)
        inputs: tuple[Tensor, ...] = (features,)
    elif kind == "npz":
        _refuse("arrays", image_size=image_size)
        inputs, goal = _arrays(label, files, target, columns, lengths, notes)
    else:
        raise InputError(
            f"{label}: expected a table, an .npz file or a folder of images, got .{kind}, without a target"
        )
    name = f"{target or 'y'}"
    classes = opening.decide(goal, task, name)[2]
    parts = opening.split(opening.decide(goal, task, name)[0], classes, label)
    if standardize:
        inputs = (_standardized(inputs[0], parts["train"], inputs[1] if len(inputs) > 1 else None, notes), *inputs[1:])
    data = opening.of_arrays(inputs, goal, batch_size, os.path.basename(label) or label, name, task, notes, parts)
    shares = ", ".join(f"{len(parts[part])} for {part}" for part in PARTS)
    how = "with the classes in proportion" if classes else "at random"
    more = [f"The samples are split once, {how}: {shares}."]
    if data.task == "regression":
        data.target, scaled = _scaled_target(data.target, parts["train"])
        more.append(scaled)
    data.notes = (*data.notes, *more)
    return data


def _table(
    label: str, files: list[str], kind: str, target: str | None, columns: Sequence[str] | None, notes: list[str]
) -> tuple[Tensor, Tensor]:
    pa = need("pyarrow")
    table = pa.concat_tables([_read(file, kind) for file in files], promote_options="default")
    goal = _column(table, target, label)
    left = [name for name in table.column_names if name != target]
    chosen = list(columns) if columns else [n for n in left if _is_numeric(table.schema.field(n).type)]
    if target in chosen:
        raise InputError(f"{label}: {target!r} is the target, expected other columns as features")
    dropped = [name for name in left if name not in chosen]
    if dropped and not columns:
        notes.append(f"Left out, as they hold no numbers: {listed(dropped)}.")
    if not chosen:
        raise InputError(f"{label}: expected columns of numbers besides the target {target!r}, got none")
    values = [np.asarray(part.values, np.float64) for part in open_source(table.select(chosen), columns=chosen)]
    if not values:
        raise InputError(f"{label}: expected rows, got none")
    notes.append(f"{len(chosen)} features: {listed(chosen)}.")
    return torch.as_tensor(np.concatenate(values)), goal


def _read(file: str, kind: str) -> Any:
    pa = need("pyarrow")
    try:
        if kind == "parquet":
            return need("pyarrow.parquet").read_table(file)
        if kind == "arrow":
            return need("pyarrow.dataset").dataset(file, format="ipc").to_table()
        csv = need("pyarrow.csv")
        stem = file.lower().removesuffix(".gz").removesuffix(".bz2").removesuffix(".zst")
        return csv.read_csv(file, parse_options=csv.ParseOptions(delimiter="\t" if stem.endswith(".tsv") else ","))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error


def _column(table: Any, target: str | None, label: str) -> Tensor:
    names = table.column_names
    if target is None:
        raise InputError(f"{label}: expected target= (--target), one of its columns {listed(names)}")
    if target not in names:
        close = difflib.get_close_matches(target, names, n=1)
        hint = f", did you mean {close[0]!r}?" if close else f": it has {listed(names)}"
        raise InputError(f"{label}: no column {target!r}{hint}")
    column = table.column(target)
    if column.null_count:
        raise InputError(f"{label}: {column.null_count} rows have no {target!r}: drop them")
    if not _is_numeric(column.type):
        # Text in the order of the alphabet.
        _, places = np.unique(np.asarray(column.to_pylist(), dtype=str), return_inverse=True)
        return torch.as_tensor(places)
    return torch.as_tensor(np.array(column.to_numpy()))


def _is_numeric(type_: Any) -> bool:
    return number_type(type_) is not None and list_item(type_) is None


def _arrays(
    label: str,
    files: list[str],
    target: str | None,
    columns: Sequence[str] | None,
    lengths: str | None,
    notes: list[str],
) -> tuple[tuple[Tensor, ...], Tensor]:
    if len(files) > 1:
        raise InputError(f"{label}: expected one .npz file, got {len(files)}")
    try:
        with np.load(files[0], allow_pickle=False) as file:
            arrays: dict[str, NDArray[Any]] = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{files[0]}: cannot be read: {error}") from error
    if target is None:
        raise InputError(f"{label}: expected target= (--target), one of its arrays {listed(list(arrays))}")
    for name in (target, lengths, *(columns or ())):
        if name is not None and name not in arrays:
            raise InputError(f"{label}: no array {name!r}: it has {listed(list(arrays))}")
    goal = arrays[target]
    taken = (target, lengths)
    fit = [n for n, a in arrays.items() if n not in taken and a.ndim >= 2 and len(a) == len(goal)]
    chosen = list(columns) if columns else fit
    if len(chosen) != 1:
        raise InputError(
            f"{label}: expected one array of {len(goal)} samples besides the target, got {listed(chosen) or 'none'}: "
            "name it with columns="
        )
    values = arrays[chosen[0]]
    notes.append(f"Inputs: {chosen[0]}, {' x '.join(map(str, values.shape[1:]))} each.")
    found = torch.as_tensor(np.ascontiguousarray(values, np.float32))
    if goal.dtype.kind in "OUS":
        _, goal = np.unique(goal.astype(str), return_inverse=True)
    answer = torch.as_tensor(np.ascontiguousarray(goal))
    if lengths is None:
        return (found,), answer
    sizes = torch.as_tensor(arrays[lengths].astype(np.int64))
    if found.dim() != 3 or len(sizes) != len(found) or int(sizes.min()) < 1 or int(sizes.max()) > found.size(2):
        raise InputError(
            f"{label}: expected sequences (N, C, L) and a length of 1 to L for each, got {list(found.shape)} and "
            f"lengths from {int(sizes.min())} to {int(sizes.max())}"
        )
    notes.append("Sequences have lengths; what is behind a length is padding and counts nowhere.")
    return (found, sizes), answer


def _images(path: str, files: list[str], batch_size: int, size: int | None, standardize: bool) -> ArrayData:
    root = (
        path if os.path.isdir(path) else os.path.commonpath([os.path.dirname(os.path.dirname(file)) for file in files])
    )
    places = [os.path.relpath(file, root).split(os.sep) for file in files]
    if any(len(place) < 2 for place in places):
        raise InputError(f"{path}: expected a folder with a folder of images for each class, got images right in it")
    in_parts = {place[0].lower() for place in places} <= _FOLDERS.keys() and all(len(place) > 2 for place in places)
    names = sorted({place[1 if in_parts else 0] for place in places})
    if len(names) < 2:
        raise InputError(f"{path}: expected a folder for each of two classes or more, got {listed(names)}")
    target = torch.as_tensor([names.index(place[1 if in_parts else 0]) for place in places])
    pixels, told = _decoded(files, size)
    label = os.path.basename(os.path.normpath(path))
    notes = [f"{len(files)} images of {len(names)} classes ({listed(names)}), {told}."]
    where = [_FOLDERS[place[0].lower()] for place in places] if in_parts else []
    if set(where) == {0, 1, 2}:
        parts: Mapping[str, Tensor] = {
            name: torch.as_tensor([i for i, p in enumerate(where) if p == n]) for n, name in enumerate(PARTS)
        }
        notes.append("The folders name the parts: train, validation, test.")
    else:
        parts = opening.split(target, len(names), label)
        shares = ", ".join(f"{len(parts[part])} for {part}" for part in PARTS)
        notes.append(f"The images are split once, with the classes in proportion: {shares}.")
    inputs = pixels.float() / 255
    if standardize:
        train = inputs[parts["train"]]
        mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        inputs = (inputs - mean) / std
        notes.append("Each channel is standardized by the training part.")
    notes.append("The folders are the classes: classification, by cross-entropy.")
    opening.check_parts(parts, label)
    return ArrayData(
        (inputs,), target, parts, batch_size, label=label, notes=notes, task="classification", classes=len(names)
    )


def _decoded(files: list[str], size: int | None) -> tuple[Tensor, str]:
    image_module = need("PIL.Image")
    images = []
    for file in files:
        try:
            with image_module.open(file) as image:
                images.append(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        except (OSError, ValueError, image_module.DecompressionBombError) as error:
            raise InputError(f"{file}: cannot be read as an image: {error}") from error
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    sizes = {image.size for image in images}
    told = f"{'grey' if mode == 'L' else 'in colour'}"
    if size is None and len(sizes) > 1:
        size = min(_LARGEST_SIDE, int(np.median([min(image.size) for image in images])))
        told += f", of {len(sizes)} sizes, all brought to {size} x {size}"
    elif size is not None:
        told += f", brought to {size} x {size}"
    else:
        told += f", {images[0].size[0]} x {images[0].size[1]}"
    arrays = []
    for image in images:
        image = image if image.mode == mode else image.convert(mode)
        image = image if size is None else image.resize((size, size))
        pixels = np.asarray(image)
        arrays.append(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0))
    return torch.as_tensor(np.stack(arrays)), told


def _standardized(values: Tensor, train: Tensor, lengths: Tensor | None, notes: list[str]) -> Tensor:
    """Each feature (or channel) by the mean and deviation of the training part; what is missing becomes the mean."""
    from batchnorm.preprocessing import StandardScaler

    axis = None if values.dim() == 2 else 1
    scaler = StandardScaler() if axis is None else StandardScaler(channel_axis=axis)
    chosen = values[train].double()
    if lengths is not None:  # padding is no value
        real = torch.arange(values.size(2)) < lengths.unsqueeze(1)
        chosen = torch.where(real[train].unsqueeze(1), chosen, torch.nan)
    missing = int((~values.isfinite()).sum())
    scaler.fit(torch.where(chosen.isinf(), torch.nan, chosen).numpy())
    found = torch.as_tensor(
        np.asarray(scaler.transform(torch.where(values.isinf(), torch.nan, values.double()).numpy()))
    )
    if lengths is not None:
        found = torch.where(real.unsqueeze(1), found, 0.0)
    what = "feature" if axis is None else "channel"
    notes.append(f"Each {what} is standardized by the training part.")
    if missing:
        notes.append(f"{missing} missing values are put at the mean of the training part.")
    return found.nan_to_num(0.0).float()


def _scaled_target(target: Tensor, train: Tensor) -> tuple[Tensor, str]:
    chosen = target[train].double()
    mean, std = chosen.mean(0), chosen.std(0).clamp_min(1e-12)
    told = "The target is standardized by the training part; losses and errors are in its deviations."
    return ((target.double() - mean) / std).float(), told


def _refuse(what: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"expected no {name}= with {what}, got {value!r}")
