"""``batchnorm merge``: statistics of parts of the data as those of all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from batchnorm.cli import options


@click.command(
    short_help="Merge statistics that were learned apart.",
    epilog="""\b
Examples:
  batchnorm merge monday.safetensors tuesday.safetensors --out both.safetensors
  batchnorm merge parts/*.safetensors --out all.safetensors --json

All must be of one method, with the same features; the settings are those of the first.""",
)
@click.argument("files", metavar="A B...", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.statistics_out()
@options.force
@options.as_json
def merge(files: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    """Merge files of statistics into --out, as if all their data had been passed to one batchnorm fit."""
    if len(files) < 2:
        raise click.UsageError("expected two files or more to merge")
    options.refuse_existing(out, force)
    from batchnorm._errors import BatchnormError
    from batchnorm.preprocessing import load
    from batchnorm.preprocessing.describing import describe

    with options.warnings_told():
        merged = load(files[0])
        for file in files[1:]:
            other = load(file)
            try:
                merged.merge(other)
            except BatchnormError as error:
                raise type(error)(f"{file} does not fit {files[0]}: {error}") from error
        merged.save(out)
        found = describe(merged)
    if as_json:
        document = {
            "file": str(out),
            "merged": len(files),
            "estimator": found.estimator,
            "samples": found.samples,
            "features": found.features,
        }
        click.echo(json.dumps(document, indent=1, allow_nan=False))
        return
    from batchnorm.cli.statistics import facts

    facts(
        sys.stdout,
        {
            "merged": f"{len(files)} files",
            "learned": found.title,
            "samples": found.samples_text,
            "features": f"{found.features:,}",
            "written to": str(out),
        },
    )
