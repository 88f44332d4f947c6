"""``batchnorm recalibrate``: a checkpoint's running statistics anew, from data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import click

from batchnorm.cli import models, options


@click.command(
    short_help="Give a checkpoint the population statistics of data.",
    epilog="""\b
Examples:
  batchnorm recalibrate mypackage.models:build --checkpoint net.pt --data mypackage.data:loader --out net2.pt
  batchnorm recalibrate net.py:Net --checkpoint swa.safetensors --data images.npy --out swa2.safetensors
  batchnorm recalibrate net.py:Net --checkpoint ema.pt --key state_dict_ema --data train/ --out ema2.pt

What else the checkpoint holds (an optimizer, a step) stays as it was.""",
)
@click.argument("model", metavar="MODULE:FACTORY")
@click.option("--kwargs", metavar="JSON", callback=models.mapping, help="Arguments of the factory.")
@models.checkpoint_options(required=True)
@models.data_options(required=True)
@click.option("--num-batches", type=click.IntRange(min=1), metavar="N", help="So many batches, not all.")
@click.option(
    "--until",
    type=click.FloatRange(min=0, min_open=True),
    metavar="TOL",
    help="Stop when no mean and no deviation moves by more, in standard deviations: 0.05.",
)
@click.option(
    "--method",
    type=click.Choice(["batch", "sequential"]),
    default="batch",
    show_default=True,
    help="One pass, or one for each batch norm in a chain: exact for eval.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where the weights go.")
@options.force
@options.as_json
def recalibrate(
    model: str,
    kwargs: dict[str, Any],
    checkpoint: Path,
    key: str | None,
    data: str,
    columns: tuple[str, ...] | None,
    batch_size: int,
    stats: Path | None,
    num_batches: int | None,
    until: float | None,
    method: Literal["batch", "sequential"],
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Run the model on --data and write its weights, with the statistics of that data, to --out.

    The statistics are those of all the data at once, each sample counted once, whatever the batches. For weights that
    were averaged (SWA, EMA), whose statistics lag behind, or that go to other data than they were trained on.
    """
    options.refuse_existing(out, force)
    import batchnorm as bn
    from batchnorm.surgery.checkpoints import updated, write_checkpoint

    with options.warnings_told():
        loaded = models.load_model(model, kwargs, checkpoint, key)
        assert loaded.checkpoint is not None
        batches = models.Again(models.batches(data, columns, batch_size, stats, loaded.model))
        with options.Meter("recalibrating", unit="batches") as meter, models.failures_told(model):
            mended = bn.recalibrate(
                loaded.model, batches, num_batches=num_batches, until=until, method=method, progress=meter
            )
    write_checkpoint(updated(loaded.checkpoint, mended, loaded.prefix), out)
    done = bn.changes(mended)
    if as_json:
        click.echo(json.dumps({"out": str(out), "batches": meter.rows, "changes": done.to_list()}, indent=1))
        return
    from batchnorm.cli.diagnosis import change_table
    from batchnorm.report.terminal import console_for

    console = console_for(sys.stdout)
    console.print(change_table(done))
    console.print(f"Written: {out.resolve()}", soft_wrap=True)
