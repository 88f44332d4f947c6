"""``batchnorm fold``: a model without its batch norms, for inference."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm.cli import models, options

if TYPE_CHECKING:
    from torch import nn

_KINDS = (".safetensors", ".pt", ".pth", ".pt2", ".onnx")


@click.command(
    short_help="Fold batch norms into the layers beside them.",
    epilog="""\b
Examples:
  batchnorm fold net.py:Net --checkpoint net.pt --example-shape 1,3,224,224 --out folded.safetensors
  batchnorm fold net.py:Net --checkpoint net.pt --data images.npy --batch-size 1 --out folded.onnx
  batchnorm fold net.py:Net --checkpoint net.pt --example-shape 8,100 --out folded.pt2

What --out is: .safetensors, .pt, .pth the weights of bn.fold(model, example), to be loaded into a
model that was folded; .pt2 a program of torch.export; .onnx an ONNX model. In the last two the
batch size is free where the example has two samples or more and the model allows it.""",
)
@click.argument("model", metavar="MODULE:FACTORY")
@click.option("--kwargs", metavar="JSON", callback=models.mapping, help="Arguments of the factory.")
@models.checkpoint_options()
@models.data_options()
@models.example_shape
@click.option("--strict", is_flag=True, help="Fail where a batch norm cannot be folded.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where the result goes.")
@options.force
@options.as_json
def fold(
    model: str,
    kwargs: dict[str, Any],
    checkpoint: Path | None,
    key: str | None,
    data: str | None,
    columns: tuple[str, ...] | None,
    batch_size: int,
    stats: Path | None,
    example_shape: tuple[int, ...] | None,
    strict: bool,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Fold the batch norms of a model, in eval mode, and write what is left to --out.

    The folded model is compared with the original on an example, of --data or of normal numbers of --example-shape,
    and refused where they differ. It tells which batch norms were folded into what, and which were left and why.
    """
    if (data is None) == (example_shape is None):
        raise click.UsageError("expected an example: either --data or --example-shape")
    if out.suffix not in _KINDS:
        raise click.BadParameter(f"expected a name that ends in {', '.join(_KINDS)}, got {str(out)!r}")
    options.refuse_existing(out, force)
    import batchnorm as bn
    from batchnorm.probes.feeding import arguments

    with options.warnings_told():
        loaded = models.load_model(model, kwargs, checkpoint, key)
        if data is not None:
            example = models.first(models.batches(data, columns, batch_size, stats, loaded.model), data)
        else:
            assert example_shape is not None
            example = models.example_of(example_shape, loaded.model)
        with models.failures_told(model):
            folded = bn.fold(loaded.model.eval(), example, strict=strict)
        _write(folded, arguments(example), out)
    done = bn.changes(folded)
    if as_json:
        click.echo(json.dumps({"out": str(out), "changes": done.to_list()}, indent=1))
        return
    from batchnorm.cli.diagnosis import change_table
    from batchnorm.report.terminal import console_for

    console = console_for(sys.stdout)
    console.print(change_table(done))
    console.print(f"Written: {out.resolve()}", soft_wrap=True)


def _write(model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], out: Path) -> None:
    """Beside ``out``, and renamed when whole."""
    import torch
    from torch.utils import _pytree as pytree

    from batchnorm._errors import InputError, OutputError
    from batchnorm.surgery.checkpoints import Checkpoint, write_checkpoint

    if out.suffix not in (".pt2", ".onnx"):
        write_checkpoint(Checkpoint(out, model.state_dict(), ()), out)
        return
    partial = out.with_name(f".{secrets.token_hex(4)}.partial{out.suffix}")
    positional, named = example
    try:
        shapes = pytree.tree_map(_free_batch, (positional, named))
        program = torch.export.export(model, positional, named, dynamic_shapes=(*shapes[0], *shapes[1].values()))
        if out.suffix == ".pt2":
            torch.export.save(program, partial)
        else:
            with _without_torch_s_own_words():
                torch.onnx.export(program, f=partial, dynamo=True, external_data=False, verbose=False)
        os.replace(partial, out)
    except OSError as error:
        raise OutputError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
    except Exception as error:
        message = " ".join(str(error).split("\n")[0].split())
        raise InputError(f"torch cannot export this model: {type(error).__name__}: {message}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _without_torch_s_own_words() -> Iterator[None]:
    """The exporter says what it does not need (torchvision) and warns of its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _free_batch(value: Any) -> Any:
    """The first dimension may vary, if the program turns out to allow that."""
    import torch

    return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.dim() else None
