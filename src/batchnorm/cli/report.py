"""``batchnorm report``: the page of a run, built again from its records, or of two runs side by side."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    short_help="Rebuild the page of a run, or compare two.",
    epilog="""\b
Examples:
  batchnorm report runs/2026-01-31_12-00-00
  batchnorm report runs/2026-01-31_12-00-00 --out page.html
  batchnorm report runs/before runs/after --out difference.html""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("other", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page's file.  [default: RUN/report.html, of two runs OTHER/comparison.html]",
)
def report(run: Path, other: Path | None, out: Path | None) -> None:
    """Build the page of the study in folder RUN again, from its records.

    Also of a study that is not finished: the page then shows what is measured so far. With two folders, a page of both:
    what differs in configuration and environment, their figures one over the other, and which differences are more than
    seeds make.
    """
    from batchnorm import report as pages

    click.echo(pages.rebuild(run, out) if other is None else pages.write_pair_page(run, other, out))
