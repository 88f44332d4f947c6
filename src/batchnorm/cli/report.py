"""``batchnorm report``: the page of a run, built again from its records."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    short_help="Rebuild the page of a run.",
    epilog="""\b
Examples:
  batchnorm report runs/2026-01-31_12-00-00
  batchnorm report runs/2026-01-31_12-00-00 --out page.html""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="The page's file.  [default: RUN/report.html]"
)
def report(run: Path, out: Path | None) -> None:
    """Build the page of the study in folder RUN again, from its records.

    Also of a study that is not finished: the page then shows what is measured so far.
    """
    from batchnorm import report as pages

    click.echo(pages.rebuild(run, out))
