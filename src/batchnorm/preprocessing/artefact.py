"""A fitted estimator and the network behind it as one file, from raw data to the network's answer.

The file is a program of ``torch.export`` (a ``.pt2`` archive, which torch reads without this package too), with the
estimator's own statistics beside it. It needs neither the network's Python class nor pickle.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm._errors import DtypeError, InputError, ShapeError, StatisticsFileError
from batchnorm.preprocessing.base import Normalizer, located
from batchnorm.preprocessing.batch import Batch
from batchnorm.preprocessing.inputs import read, refuse_infinite
from batchnorm.preprocessing.saving import from_bytes, to_bytes, write_whole
from batchnorm.preprocessing.sources import Source, open_source
from batchnorm.preprocessing.sparse import SparseBatch

_FORMAT = "batchnorm.model"
_VERSION = 1
_HEADER, _STATISTICS = f"{_FORMAT}.json", f"{_FORMAT}.statistics"
_REMEDY = "write it again with save_model()"
# Every record of an archive, below its root folder, that has neither a pickle nor compiled code in it.
_RECORDS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|models/model\.json|data/sample_inputs/model\.pt|extra/({re.escape(_HEADER)}|{re.escape(_STATISTICS)})"
    r"|archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment"
)
# What torch raises for a program that it cannot trace, or cannot read.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


class _Fronted(nn.Module):
    """The network behind the estimator's module, whose result gets the network's dtype."""

    def __init__(self, front: nn.Module, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.front = front
        self.network = network
        self.dtype = dtype

    def forward(self, x: Tensor) -> Any:
        y = self.front(x)
        return self.network(y if self.dtype is None else y.to(self.dtype))


class SavedModel:
    """What :func:`load_model` gives: call it with raw data.

    ``estimator``: the fitted estimator, which could go on learning (the program would not follow). ``program``: the
    ``torch.export.ExportedProgram`` from raw data to the answer. ``dtype`` and ``shape``: of one sample of raw data.
    """

    def __init__(self, estimator: Any, program: torch.export.ExportedProgram, header: dict[str, Any]) -> None:
        self.estimator = estimator
        self.program = program
        self.dtype: torch.dtype = getattr(torch, header["dtype"])
        self.shape = tuple(int(size) for size in header["shape"])
        self._run = program.module()
        tensors = (*program.state_dict.values(), *program.constants.values())
        self.device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))

    def module(self) -> nn.Module:
        """The program as a new ``nn.Module``, in evaluation mode for good: to be converted or differentiated."""
        return self.program.module()

    def __call__(self, X: Any) -> Any:
        """The network's answer for raw data (N, features) or (N, C, *): NumPy, torch, pandas, polars or nested lists.

        Tensors give tensors, other data NumPy arrays; without gradients, for which there is ``module``. A stream of
        batches (a path, a DataLoader, see ``open_source``) gives an iterator of answers.

        As in the estimator's ``transform`` NaN passes, and an InputError names infinite values or columns that differ
        from the fitted ones; ShapeError for another width or size. A DtypeError refuses data more precise than the
        ``dtype`` of the example that the model was saved with, as rounding raw data may lose all that varies.
        """
        if self.estimator._is_stream(X):
            return self._answers(open_source(X))
        return self._answer(X, read(self.estimator, X, reset=False))

    def _answers(self, source: Source) -> Iterator[Any]:
        for part in source:
            if len(part.values):
                with located(part):
                    answer = self._answer(part.values, self.estimator._read_part(source, part, reset=False))
                yield answer

    def _answer(self, X: Any, batch: Batch) -> Any:
        values = _dense(self.estimator, batch)
        if tuple(values.shape[1:]) != self.shape:
            raise ShapeError(f"expected data of shape {_shown(self.shape)}, got {_shown(values.shape[1:])}")
        if not _holds(self.dtype, values.dtype):
            raise DtypeError(
                f"the model was saved for {self.dtype} and would round {values.dtype}: convert the data, "
                f"or save the model with an example of {values.dtype}"
            )
        with torch.no_grad():
            result = self._run(values.to(self.device, self.dtype))
        return result if isinstance(X, Tensor) else pytree.tree_map_only(Tensor, _as_array, result)

    def __repr__(self) -> str:
        return f"SavedModel({self.estimator!r}, {_shown(self.shape)} of {self.dtype})"


def save_model(path: str | PathLike[str], estimator: Normalizer, network: nn.Module, example: Any) -> None:
    """Write ``estimator`` and ``network`` to one file, which :func:`load_model` makes callable on raw data.

    ``network``: takes one tensor, what ``estimator`` gives; it is exported on the CPU and in evaluation mode, and stays
    as it was. ``example``: a batch of raw data as it will come, whose dtype and shape (but for the number of rows) the
    file then expects. Data in float64 are centred in float64, before the network's own dtype.

    What torch reads back is run on the example and compared with the network before anything is written; the file
    appears whole or not at all. Raises what ``transform`` raises for the example, DtypeError for other objects,
    InputError where the network cannot be exported or does not give the same answer again, OutputError where the file
    cannot be written.
    """
    if not isinstance(estimator, Normalizer):
        raise DtypeError(f"expected a fitted estimator of batchnorm.preprocessing, got {type(estimator).__name__}")
    if not isinstance(network, nn.Module):
        raise DtypeError(f"expected the network to be an nn.Module, got {type(network).__name__}")
    check_is_fitted(estimator)
    statistics = to_bytes(estimator)
    x = _dense(estimator, read(estimator, example, reset=False)).cpu()
    x = x.repeat(2, *[1] * (x.ndim - 1)) if len(x) == 1 else x  # one row would be taken for a constant
    header = {"format": _FORMAT, "version": _VERSION, "dtype": str(x.dtype).partition(".")[2], "shape": x.shape[1:]}
    records = {_HEADER: json.dumps(header), _STATISTICS: base64.b64encode(statistics).decode()}
    write_whole(path, _export(_fronted(estimator, network, x.dtype), x, records), "the model")


def load_model(path: str | PathLike[str], device: str | torch.device | None = None) -> SavedModel:
    """The model that :func:`save_model` wrote to ``path``, on the CPU or on ``device``.

    Nothing in the file is unpickled, and one that holds pickles or compiled code is refused. It is a program all the
    same, and ``torch.export.load`` evaluates expressions in it as Python: load no file of somebody you don't trust.
    The statistics alone (``save`` and ``load``) have no such limit.

    Raises StatisticsFileError where the file is missing, truncated, damaged or foreign, or of a newer version,
    InputError for a device that is not there.
    """
    from torch.export.passes import move_to_device_pass

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use the device {str(device)!r}: {_line(error)}") from error
    label = repr(str(Path(path)))
    try:
        with open(path, "rb") as file:
            header = _check_records(file, label)
            extra = {_STATISTICS: ""}
            file.seek(0)
            try:
                program = torch.export.load(file, extra_files=extra)
                if device is not None:
                    program = move_to_device_pass(program, device)
                estimator = from_bytes(base64.b64decode(extra[_STATISTICS], validate=True), f"the estimator in {label}")
                return SavedModel(estimator, program, header)
            except StatisticsFileError:
                raise
            except _FAILURES as error:
                raise StatisticsFileError(f"{label} holds a program that torch cannot read: {_line(error)}") from error
    except OSError as error:
        raise StatisticsFileError(f"cannot read the model {label}: {error.strerror or error}") from error


def _dense(estimator: Normalizer, batch: Batch) -> Tensor:
    """Data that the estimator would transform and a network can take."""
    if isinstance(batch, SparseBatch):
        raise DtypeError("expected dense data for the network, got sparse ones: X.toarray(), or X.to_dense()")
    refuse_infinite(estimator, batch)
    return batch.values


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether ``dtype`` takes in the numbers of ``other`` as they are; torch calls it so for integers and floats."""
    try:
        return torch.promote_types(other, dtype) == dtype
    except RuntimeError:  # for two kinds of integers of which one is unsigned
        return False


def _fronted(estimator: Normalizer, network: nn.Module, dtype: torch.dtype) -> _Fronted:
    wide = dtype == torch.float64 or (dtype.itemsize > 2 and not dtype.is_floating_point)
    try:
        network = copy.deepcopy(network).cpu()
    except _FAILURES as error:
        raise InputError(f"the {type(network).__name__} cannot be copied for export: {_line(error)}") from error
    tensors = (*network.parameters(), *network.buffers())
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise InputError(f"the {type(network).__name__} has layers without weights yet: run a batch through it first")
    own = next((t.dtype for t in tensors if t.is_floating_point()), None)
    model = _Fronted(estimator.to_module(torch.float64 if wide else torch.float32), network, own)
    model.eval()
    return model


def _export(model: _Fronted, x: Tensor, records: dict[str, str]) -> memoryview:
    """The archive, once what torch reads from it has given the network's answer."""
    name = f"the {type(model.network).__name__}"
    buffer = io.BytesIO()
    with torch.no_grad():
        try:
            expected = model(x)
        except (RuntimeError, TypeError) as error:
            shape = _shown(model.front(x).shape[1:])
            raise InputError(f"{name} does not take what the estimator gives, {shape}: {_line(error)}") from error
        try:
            program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
            _leave_out_the_source(program)
            torch.export.save(program, buffer, extra_files=records)
        except _FAILURES as error:
            raise InputError(f"{name} cannot be exported for any number of rows: {_line(error)}") from error
        try:
            _check_records(buffer, name)
            buffer.seek(0)
            found = torch.export.load(buffer).module()(x)
        except _FAILURES as error:
            raise InputError(
                f"the file of {name} could not be read again, let it hold plain tensors and give tensors and numbers: "
                + _line(error)
            ) from error
        try:
            torch.testing.assert_close(_tensors(found), _tensors(expected), equal_nan=True)
        except AssertionError as error:
            raise InputError(f"{name} does not give the same answer twice, or not when exported") from error
    return buffer.getbuffer()


def _leave_out_the_source(program: torch.export.ExportedProgram) -> None:
    """The paths and lines of source that torch notes in a program, and the example, which would be a pickle."""
    for graph in program.graph_module.modules():
        for node in getattr(getattr(graph, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    program.example_inputs = None


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _check_records(file: Any, label: str) -> dict[str, Any]:
    """The header of an archive whose records are whole, known, and no pickles. Raises StatisticsFileError."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
            records = {name.partition("/")[2]: name for name in names}
            if f"extra/{_HEADER}" not in records:
                raise StatisticsFileError(f"{label} is no model of batchnorm.preprocessing: {_REMEDY}")
            header = dict(json.loads(archive.read(records[f"extra/{_HEADER}"])))
            pickled = [name for name in records if not _RECORDS.fullmatch(name)]
            for part in ("weights", "constants"):
                config = json.loads(archive.read(records[f"data/{part}/model_{part}_config.json"]))["config"]
                pickled += [name for name, entry in config.items() if entry["use_pickle"] is not False]
            inputs = records.get("data/sample_inputs/model.pt")
            if inputs is not None and archive.getinfo(inputs).file_size:
                pickled.append("data/sample_inputs/model.pt")
    except StatisticsFileError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error, *_FAILURES) as error:
        raise StatisticsFileError(
            f"{label} is truncated, damaged or no model of batchnorm.preprocessing ({_line(error)}): {_REMEDY}"
        ) from error
    if damaged is not None:
        raise StatisticsFileError(f"{label} is damaged, {damaged!r} does not match its checksum: {_REMEDY}")
    if len(records) < len(names) or pickled:
        raise StatisticsFileError(f"{label} holds pickles, compiled code or other foreign parts: {sorted(pickled)}")
    if header.get("version") != _VERSION:
        raise StatisticsFileError(
            f"{label} is of version {header.get('version')} of the format, this package reads {_VERSION}: "
            "use the batchnorm that wrote it, or a newer one"
        )
    return header


def _as_array(tensor: Tensor) -> Any:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def _shown(shape: Any) -> str:
    return "(" + ", ".join(["N", *map(str, shape)]) + ")"


def _line(error: BaseException) -> str:
    """The first line of a message of torch, which may go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
