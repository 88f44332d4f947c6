"""``batchnorm inspect``: what a file of statistics holds, and what in it is worth a second look."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from batchnorm.cli import options


@click.command(
    short_help="Show saved statistics.",
    epilog="""\b
Examples:
  batchnorm inspect stats.safetensors
  batchnorm inspect stats.safetensors --all
  batchnorm inspect stats.safetensors --html stats.html
  batchnorm inspect stats.safetensors --json | jq '.columns.mean'""",
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--all", "every", is_flag=True, help="Every feature and every direction, not twenty.")
@click.option("--html", type=click.Path(path_type=Path), metavar="PAGE", help="Write a page with plots, too.")
@options.force
@options.as_json
def inspect(file: Path, every: bool, html: Path | None, force: bool, as_json: bool) -> None:
    """Show the statistics in FILE: means and deviations, the spectrum of a whitener, and what is suspicious.

    Suspicious are constant features and such without a value, deviations lost beside their means, scales far apart,
    and for whitening few samples, linear dependence and a large condition number.
    """
    if html is not None:
        options.refuse_existing(html, force)
    from batchnorm.preprocessing import load
    from batchnorm.preprocessing.describing import describe

    about = describe(load(file))
    if html is not None:
        import batchnorm.report.statistics as pages

        pages.build(about, html, str(file))
    if as_json:
        click.echo(json.dumps({"file": str(file), **about.to_dict()}, indent=1, allow_nan=False))
        return
    from batchnorm.cli.statistics import screen
    from batchnorm.report.terminal import console_for

    console = console_for(sys.stdout)
    console.print(screen(about, str(file), every))
    if html is not None:
        console.print(f"The page: {html.resolve()}", soft_wrap=True)
