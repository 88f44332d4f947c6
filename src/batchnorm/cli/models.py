"""Models and their data on the command line: ``module:factory``, a file of weights, a source of batches."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm._errors import BatchnormError, InputError
from batchnorm.cli import options
from batchnorm.cli.options import Command

if TYPE_CHECKING:
    import torch
    from torch import nn, optim

    from batchnorm.surgery.checkpoints import Checkpoint


@dataclass
class Loaded:
    """A model from the command line.

    Attributes:
        model: as its factory made it, with the checkpoint's weights.
        optimizer: where the factory returns one beside it.
        file: the source of the factory, for annotations; None where it has none.
        line: where in it.
        checkpoint: the file of weights, or None.
        prefix: what the checkpoint's keys have before the model's.
    """

    model: nn.Module
    optimizer: optim.Optimizer | None = None
    file: str | None = None
    line: int = 1
    checkpoint: Checkpoint | None = None
    prefix: str = ""


def checkpoint_options(required: bool = False) -> Callable[[Command], Command]:
    """``--checkpoint`` and ``--key``."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option("--key", metavar="NAME", help="Where the state is in the checkpoint: state_dict_ema."),
            click.option(
                "--checkpoint",
                metavar="FILE",
                required=required,
                type=click.Path(path_type=Path),
                help="Weights: .safetensors, or torch.save's, of which only tensors are read.",
            ),
        ):
            command = option(command)
        return command

    return decorate


def data_options(required: bool = False) -> Callable[[Command], Command]:
    """``--data``, ``--columns``, ``--batch-size`` and ``--stats``."""

    def decorate(command: Command) -> Command:
        for option in (
            click.option(
                "--stats",
                metavar="FILE",
                type=click.Path(path_type=Path),
                help="Normalize files by these statistics, of batchnorm fit, before the model sees them.",
            ),
            click.option(
                "--batch-size",
                type=click.IntRange(min=1),
                default=64,
                show_default=True,
                metavar="N",
                help="Samples in a batch, of files.",
            ),
            options.columns,
            click.option(
                "--data",
                metavar="SRC",
                required=required,
                help="Batches: a file or folder as for batchnorm fit, or module:function.",
            ),
        ):
            command = option(command)
        return command

    return decorate


example_shape = click.option(
    "--example-shape",
    metavar="N,C,...",
    callback=lambda c, p, v: _shape(c, p, v),
    help="Of an input, where no data are.",
)


def load_model(where: str, kwargs: dict[str, Any], checkpoint: Path | None, key: str | None) -> Loaded:
    """Make the model, and load its weights where there are some.

    Raises InputError for a module or factory that is not there, fails, or gives no model; CheckpointError.
    """
    from torch import nn, optim

    factory = find(where)
    made = _called(where, factory, kwargs) if not isinstance(factory, nn.Module) else factory
    model, optimizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (optimizer is None or isinstance(optimizer, optim.Optimizer)):
        raise InputError(
            f"expected {where} to give a torch.nn.Module, or one and its optimizer, got {type(made).__name__}"
        )
    if key is not None and checkpoint is None:
        raise click.UsageError("--key is a place in a --checkpoint")
    loaded = Loaded(model, optimizer, *_source_of(factory))
    if checkpoint is not None:
        from batchnorm.surgery.checkpoints import load_into, read_checkpoint

        loaded.checkpoint = read_checkpoint(checkpoint, key)
        loaded.prefix = load_into(model, loaded.checkpoint)
    return loaded


def find(where: str) -> Any:
    """What ``package.module:name`` or ``path/to/file.py:name`` means; the current folder is searched first.

    Raises InputError.
    """
    module_name, _, name = where.rpartition(":")
    if not module_name or not name:
        raise InputError(f"expected module:name or file.py:name, got {where!r}")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = _of_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"cannot import {module_name}: {type(error).__name__}: {_line(error)}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            raise InputError(f"{module_name} has no {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        found = getattr(found, part)
    return found


def batches(
    source: str, columns: tuple[str, ...] | None, batch_size: int, stats: Path | None, model: nn.Module
) -> Callable[[], Iterator[Any]]:
    """How to go through the data of ``--data``: each call begins anew.

    Of files a batch is a float tensor, of the model's dtype. Raises InputError for what cannot be read.
    """
    if ":" in source and not Path(source).exists():
        import torch

        if stats is not None or columns is not None:
            raise click.UsageError("--stats and --columns are for files: a function's batches are taken as they are")
        function = find(source)
        first = _called(source, function, {}) if callable(function) else function
        # One batch can be gone through too, by its rows or keys, and a Sequential by its layers.
        if not hasattr(first, "__iter__") or isinstance(first, torch.Tensor | torch.nn.Module | Mapping | str):
            raise InputError(f"expected {source} to give batches to iterate over, got {type(first).__name__}")
        # A generator is spent after one pass: the function is called again for the next.
        again = isinstance(first, Iterator) and callable(function)
        return lambda: iter(function() if again else first)
    from batchnorm.preprocessing.sources import open_source

    opened = open_source(source, columns=columns, batch_rows=batch_size)
    estimator = None
    if stats is not None:
        from batchnorm.preprocessing import load

        estimator = load(stats)

    dtype = _dtype_of(model)

    def parts() -> Iterator[Any]:
        import numpy as np
        import torch

        for part in opened:
            values = part.values if estimator is None else estimator.transform(part.values)
            tensor = torch.as_tensor(np.ascontiguousarray(values))
            yield tensor.to(dtype)

    return parts


@contextlib.contextmanager
def failures_told(where: str) -> Iterator[None]:
    """What a model's own code raises, as an InputError of one line."""
    try:
        yield
    except BatchnormError:
        raise
    except Exception as error:
        raise InputError(f"{where} fails on these data: {type(error).__name__}: {_line(error)}") from error


def first(begin: Callable[[], Iterator[Any]], source: str) -> Any:
    """The first batch. Raises InputError where there is none."""
    for batch in begin():
        return batch
    raise InputError(f"expected at least one batch of {source}, got none")


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of its first floating-point parameter."""
    import torch

    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


class Again:
    """Batches that can be gone through more than once."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()

    def first(self, count: int) -> Again:
        """The first ``count`` of them."""
        return Again(lambda: itertools.islice(self._begin(), count))


def example_of(shape: tuple[int, ...], model: nn.Module) -> torch.Tensor:
    """Standard normal, the same each time."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_dtype_of(model))


def _shape(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    sizes = value.replace("x", ",").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise click.BadParameter(f"expected sizes parted by commas, such as 1,3,224,224, got {value!r}", ctx, param)
    return tuple(int(size) for size in sizes)


def mapping(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any]:
    """A JSON object."""
    if value is None:
        return {}
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"expected a JSON object, got {value!r} ({error.msg})", ctx, param) from None
    if not isinstance(found, dict):
        raise click.BadParameter(f"expected a JSON object, got {value!r}", ctx, param)
    return found


def _called(where: str, factory: Any, kwargs: dict[str, Any]) -> Any:
    if not callable(factory):
        raise InputError(f"expected {where} to be a function or class, got {type(factory).__name__}")
    try:
        return factory(**kwargs)
    except Exception as error:
        raise InputError(f"{where} fails: {type(error).__name__}: {_line(error)}") from error


def _of_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise InputError(f"no such file: {path!r}")
    module = importlib.util.module_from_spec(spec)
    # Classes of the file are found again by their module's name, by pickle and by dataclasses.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _source_of(factory: Any) -> tuple[str | None, int]:
    try:
        return inspect.getsourcefile(factory), inspect.getsourcelines(factory)[1]
    except (TypeError, OSError):  # an object, or a function without a file
        return None, 1


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
