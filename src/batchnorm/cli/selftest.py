"""``batchnorm selftest``: which implementations run here, and how exact they are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from typing import Any

import click


@click.command(
    short_help="Check every operator on this machine.",
    epilog="""\b
Examples:
  batchnorm selftest
  batchnorm selftest --json | jq .implementation.active

Exit codes: 0 every check passed, 1 one failed.""",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def selftest(as_json: bool) -> int:
    """Check each operator on each device, dtype and memory format here.

    The error against float64 stands beside torch's own, and beside the tolerance that it must keep.
    """
    from batchnorm.ops import native
    from batchnorm.ops import selftest as checks

    found = checks.run()
    status = native.status()  # afterwards: whether a GPU's kernels compile is known once they have been wanted
    passed = all(check.passed for check in found)
    if as_json:
        rows = [{key: _plain(value) for key, value in dataclasses.asdict(check).items()} for check in found]
        document = {"passed": passed, "implementation": dataclasses.asdict(status), "checks": rows}
        click.echo(json.dumps(document, indent=1, allow_nan=False))
    else:
        _show(status, found)
    return 0 if passed else 1


def _plain(value: Any) -> Any:
    # JSON has no infinity and no NaN; a failed check may well have measured one.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(status: Any, found: Any) -> None:
    from rich.text import Text

    from batchnorm.report.terminal import console_for, simple_table

    console = console_for(sys.stdout)
    why = f" ({status.reason})" if status.reason else f" ({status.library})" if status.library else ""
    console.print(Text.assemble("implementation: ", (status.active, "bold"), why), soft_wrap=True)
    why = f" ({status.cuda_reason})" if status.cuda_reason else ""
    console.print(Text.assemble("on GPUs: ", (status.cuda, "bold"), why), soft_wrap=True)
    table = simple_table(("op", "runs", "error", "torch's", "tolerance", ""), numeric=("error", "torch's", "tolerance"))
    for place, checks in itertools.groupby(found, key=_place):
        table.add_section()
        table.add_row(Text(place, "bold"))
        for check in checks:
            table.add_row(
                Text(f"  {check.op}"),
                Text(check.implementation),
                _error(check.error),
                _error(check.peer_error),
                _error(check.tolerance),
                Text("passed", "green") if check.passed else Text("FAILED", "bold red"),
            )
    console.print(table)
    failed = sum(not check.passed for check in found)
    result = f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed"
    console.print(Text(result, "bold red" if failed else "bold green"))


def _place(check: Any) -> str:
    where = f"{check.device}, {check.dtype}, {check.memory_format}"
    return f"{where}, {check.note}" if check.note else where


def _error(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1e}"
