"""``batchnorm doctor``: what is wrong with the normalization of a model."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from batchnorm import __version__
from batchnorm.cli import models, options

if TYPE_CHECKING:
    from batchnorm.probes.health import Diagnosis, DoctorConfig, Rule

FOUND = 3
"""The exit code where something was found: 1 is an error of the doctor's own, as in all commands."""


@click.command(
    short_help="Find what is wrong with a model's normalization.",
    epilog="""\b
Examples:
  batchnorm doctor mypackage.models:build
  batchnorm doctor train.py:Net --kwargs '{"classes": 10}' --checkpoint net.safetensors
  batchnorm doctor mypackage.models:build --data mypackage.data:loader
  batchnorm doctor mypackage.models:build --data images.npy --batch-size 32 --json
  batchnorm doctor mypackage.models:build --format sarif > doctor.sarif
  batchnorm doctor --rules
  batchnorm doctor --explain BN201

MODULE:FACTORY is a function or class that gives the model, or (model, optimizer), or a model.
pyproject.toml may say under [tool.batchnorm.doctor]: select, ignore, fail-on, and layers, a
table of patterns and the codes that are ignored there.

Exit codes: 0 nothing found that is as bad as --fail-on, 3 something is, 1 an error, 2 wrong usage.""",
)
@click.argument("model", metavar="[MODULE:FACTORY]", required=False)
@click.option("--kwargs", metavar="JSON", callback=models.mapping, help="Arguments of the factory.")
@models.checkpoint_options()
@models.data_options()
@models.example_shape
@click.option("--num-batches", type=click.IntRange(min=1), metavar="N", help="Look at so many batches at most.")
@click.option("--select", metavar="CODES", callback=options.names, help="Only these rules: BN2,never-updated.")
@click.option("--ignore", metavar="CODES", callback=options.names, help="Not these rules.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "info", "never"]),
    help="The mildest finding that fails.  [default: warning]",
)
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="In place of the pyproject.toml here.")
@click.option("--no-config", is_flag=True, help="Read no pyproject.toml.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "json", "sarif", "github"]),
    default="text",
    show_default=True,
    help="For people, programs, code scanners, GitHub's annotations.",
)
@options.as_json
@click.option("--all", "every", is_flag=True, help="Each layer by itself, not one line for all with the same fault.")
@click.option("--rules", "list_rules", is_flag=True, help="List the rules and exit.")
@click.option("--explain", metavar="CODE", help="Say what a rule finds and why, and exit.")
def doctor(
    model: str | None,
    kwargs: dict[str, Any],
    checkpoint: Path | None,
    key: str | None,
    data: str | None,
    columns: tuple[str, ...] | None,
    batch_size: int,
    stats: Path | None,
    example_shape: tuple[int, ...] | None,
    num_batches: int | None,
    select: tuple[str, ...] | None,
    ignore: tuple[str, ...] | None,
    fail_on: str | None,
    config: Path | None,
    no_config: bool,
    style: str,
    as_json: bool,
    every: bool,
    list_rules: bool,
    explain: str | None,
) -> int:
    """Examine the model that MODULE:FACTORY makes, its weights, and what data do in it.

    The model alone shows faults of structure, settings and state (BN0, BN1, BN2); --data those of running statistics,
    batches and activations (BN3). Nothing is changed.
    """
    if list_rules or explain is not None:
        return _show_rules(explain, as_json or style == "json")
    if model is None:
        raise click.UsageError("Missing argument 'MODULE:FACTORY'.")
    from batchnorm.probes.health import diagnose, selected

    wanted = _wanted(select, ignore, fail_on, config, no_config)
    with options.warnings_told():
        loaded = models.load_model(model, kwargs, checkpoint, key)
        batches = None if data is None else models.Again(models.batches(data, columns, batch_size, stats, loaded.model))
        example = None if example_shape is None else models.example_of(example_shape, loaded.model)
        with models.failures_told(model):
            found = diagnose(
                loaded.model,
                batches if num_batches is None or batches is None else batches.first(num_batches),
                example,
                optimizer=loaded.optimizer,
                select=wanted.select,
                ignore=wanted.ignore,
            )
    found = wanted.without_ignored(found)
    style = "json" if as_json else style
    if style == "text":
        _show(sys.stdout, found, model, every)
    else:
        rules = [_about(rule) for rule in selected() if rule.code in found.checked]
        _write(style, found, rules, model, loaded)
    return FOUND if wanted.fails(found) else 0


def _wanted(
    select: tuple[str, ...] | None,
    ignore: tuple[str, ...] | None,
    fail_on: str | None,
    config: Path | None,
    no_config: bool,
) -> DoctorConfig:
    """The project's wishes, and those of the command line in their place; what is ignored adds up."""
    from batchnorm.probes.health import DoctorConfig, find_config, read_config

    path = None if no_config else config or find_config(Path.cwd())
    wanted = DoctorConfig() if path is None else read_config(path)
    if select is not None:
        wanted = dataclasses.replace(wanted, select=select)
    if ignore is not None:
        wanted = dataclasses.replace(wanted, ignore=(*wanted.ignore, *ignore))
    if fail_on is not None:
        wanted = dataclasses.replace(wanted, fail_on=None if fail_on == "never" else fail_on)  # type: ignore[arg-type]
    return wanted


def _about(rule: Rule) -> dict[str, str]:
    return {
        "code": rule.code,
        "name": rule.name,
        "severity": rule.severity,
        "needs": rule.needs,
        "summary": rule.summary,
        "explanation": rule.explanation,
    }


def _show_rules(explain: str | None, as_json: bool) -> int:
    from batchnorm.probes.health import rules, selected

    shown = [_about(rule) for rule in (rules() if explain is None else selected([explain]))]
    if as_json:
        click.echo(json.dumps(shown, indent=1))
    elif explain is not None:
        texts = [f"{rule['code']} {rule['name']} ({rule['severity']})\n\n{rule['explanation']}" for rule in shown]
        click.echo("\n\n".join(texts))
    else:
        from rich.text import Text

        from batchnorm.report.terminal import console_for, simple_table

        table = simple_table(("code", "name", "severity", "needs", "finds"))
        for rule in shown:
            cells = (rule["code"], rule["name"], rule["severity"], rule["needs"], rule["summary"])
            table.add_row(*(Text(cell) for cell in cells))
        console_for(sys.stdout).print(table)
    return 0


def _write(style: str, found: Diagnosis, rules: list[dict[str, str]], model: str, loaded: models.Loaded) -> None:
    from batchnorm.report.findings import github, sarif

    document = found.to_dict()
    place = None if loaded.file is None else os.path.relpath(loaded.file)
    if place is not None and place.startswith(".."):
        place = None  # outside of the project: an annotation there would be on no file of it
    if style == "json":
        click.echo(json.dumps({"model": model, **document}, indent=1, allow_nan=False))
    elif style == "sarif":
        log = sarif(document["findings"], rules, __version__, place, loaded.line)
        click.echo(json.dumps(log, indent=1, allow_nan=False))
    elif document["findings"]:
        click.echo(github(document["findings"], place, loaded.line))


def _show(stream: TextIO, found: Diagnosis, model: str, every: bool) -> None:
    from batchnorm.cli.diagnosis import screen
    from batchnorm.report.terminal import console_for

    console_for(stream).print(screen(found, model, every))
