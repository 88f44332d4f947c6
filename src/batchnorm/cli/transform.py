"""``batchnorm transform``: data of any size, normalized with saved statistics."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from batchnorm.cli import options


@click.command(
    short_help="Normalize files of any size with saved statistics.",
    epilog="""\b
Examples:
  batchnorm transform test.npy --stats stats.safetensors --out test-normalized.npy
  batchnorm transform test.parquet --stats stats.safetensors --out normalized.parquet
  batchnorm transform data/ --stats stats.safetensors --out normalized/      files of the same names
  batchnorm transform test.csv --stats stats.safetensors --dtype float32 --out test.npy
  batchnorm transform normalized.npy --stats stats.safetensors --inverse --out again.npy
  batchnorm transform test.npy --stats stats.safetensors --out normalized.npy --resume

The result is made in DST.partial and moved to DST when whole. After an interrupt (Ctrl-C, a kill, a
power cut) the same command with --resume goes on; after an error the partial result is removed,
unless --resume was given.""",
)
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=click.Path())
@click.option("--stats", type=click.Path(path_type=Path), metavar="FILE", required=True, help="From batchnorm fit.")
@click.option("--out", type=click.Path(), metavar="DST", required=True, help="A file, by its suffix; or a folder.")
@click.option("--inverse", is_flag=True, help="Back to the data's own units.")
@click.option(
    "--dtype", type=click.Choice(["float16", "float32", "float64"]), help="Of the results.  [default: the data's]"
)
@options.columns
@click.option("--drop-others", is_flag=True, help="Write the features alone, without the table's other columns.")
@options.batch_rows
@click.option("--resume", is_flag=True, help="Go on with what an interrupt has left.")
@click.option("--ray", metavar="ADDRESS", help="Transform on a Ray cluster: auto, local, or its address.")
@options.force
@options.as_json
def transform(
    sources: tuple[str, ...],
    stats: Path,
    out: str,
    inverse: bool,
    dtype: str | None,
    columns: tuple[str, ...] | None,
    drop_others: bool,
    batch_rows: int | None,
    resume: bool,
    ray: str | None,
    force: bool,
    as_json: bool,
) -> int | None:
    """Transform the files SRC with the statistics of --stats, block by block, into DST.

    One file gives one file, of the kind that DST's suffix says; a folder, a 'pattern' or several files give a folder
    of files of the same names. Columns that are no features (labels, ids, weights) are carried along as they are, at
    their places. Missing values stay missing.
    """
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other: go on with what is there, or replace it")
    if ray is not None and (dtype or drop_others or batch_rows or resume or force):
        raise click.UsageError("--ray goes with --columns and --inverse alone, and writes a new folder")
    from batchnorm.preprocessing import load, transform_file

    estimator = load(stats)
    began = time.perf_counter()
    if ray is not None:
        from batchnorm.preprocessing.distributed import transform_files_on_ray

        options.quiet_ray()
        transform_files_on_ray(estimator, list(sources), out, columns=columns, inverse=inverse, address=ray)
        _tell({"out": out}, time.perf_counter() - began, as_json)
        return None
    try:
        with options.warnings_told(), options.Meter(f"transform {Path(sources[0]).name}") as meter:
            done = transform_file(
                estimator,
                sources[0] if len(sources) == 1 else list(sources),
                out,
                columns=columns,
                inverse=inverse,
                dtype=dtype,
                batch_rows=batch_rows,
                keep_columns=not drop_others,
                resume=resume,
                overwrite=force,
                progress=meter,
            )
    except KeyboardInterrupt:
        return _interrupted(out)
    document = {"out": str(done.path), "files": done.files, "rows": done.rows, "resumed": done.resumed}
    _tell(document, time.perf_counter() - began, as_json)
    return None


def _interrupted(out: str) -> int:
    from batchnorm.preprocessing.sinks import interrupted_rows

    rows = interrupted_rows(out)
    if rows is None:
        click.echo("batchnorm: interrupted", err=True)
        return 130
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--force")]
    again = shlex.join(["batchnorm", *words, "--resume"])
    click.echo(f"batchnorm: interrupted, {rows:,} rows are kept; go on with: {again}", err=True)
    return 130


def _tell(document: dict[str, Any], seconds: float, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**document, "seconds": round(seconds, 3)}, indent=1, allow_nan=False))
        return
    from batchnorm.cli.statistics import facts

    rows, before, files = (document.get(name, 0) for name in ("rows", "resumed", "files"))
    new = rows - before
    rate = f" ({new / seconds:,.0f} rows a second)" if seconds >= 0.05 and new else ""
    lines = {
        "rows": (f"{rows:,}" + (f", {before:,} of them before" if before else "")) if rows else "",
        "files": f"{files:,}" if files > 1 else "",
        "time": f"{seconds:.2f} s{rate}",
        "written to": document["out"],
    }
    facts(sys.stdout, {name: text for name, text in lines.items() if text})
