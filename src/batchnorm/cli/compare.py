"""``batchnorm compare``: would a normalization help this network on these data?"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from batchnorm._errors import BatchnormError, InputError
from batchnorm.cli import models, options
from batchnorm.cli.study import _fresh_folder, _require_page_makers

if TYPE_CHECKING:
    from batchnorm.study import events
    from batchnorm.study.comparison import Comparison

# Seconds between two pages of what is there so far.
_PAGE_EVERY = 60.0
# Options that do not change what is measured, and are no part of the command that does it again.
_FREE = ("out", "resume", "as_json", "workers", "ray", "tensorboard")
_KINDS = ("none", "batch", "torch", "renorm", "ghost", "group", "layer", "instance", "iternorm", "decorrelated")


def _rates(ctx: click.Context, param: click.Parameter, value: str) -> str | tuple[float, ...]:
    if value == "auto":
        return value
    try:
        return tuple(float(rate) for rate in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected auto or rates parted by commas, got {value!r}", ctx, param) from None


def _complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in _KINDS if name.startswith(last)]


@click.command(
    short_help="Compare normalizations on your own network and data.",
    epilog="""\b
Examples:
  batchnorm compare --data wine.csv --target class
  batchnorm compare --data photos/ --variants none,batch,group --budget 10m
  batchnorm compare --model net:make --data net:loaders --variants batch,ghost=16,renorm --lr 0.1,0.3
  batchnorm compare --data speech.npz --target word --lengths length --seeds 5 --json
  batchnorm compare --resume --out runs/2026-01-31_12-00-00
  batchnorm report runs/2026-01-31_12-00-00          the page of what is there so far

The folder then holds config.toml, records.jsonl, summary.json and report.html.""",
)
@click.option(
    "--model",
    metavar="MOD:FACTORY",
    help="A function of the normalization, one without arguments, or a model.  [default: a small network for the data]",
)
@click.option(
    "--data",
    metavar="SRC",
    help="CSV, Parquet, Arrow or NPZ; a folder with a folder of images for each class; or module:loaders.",
)
@click.option("--target", metavar="COLUMN", help="What is to be told: a column, or an array of an .npz file.")
@options.columns
@click.option("--lengths", metavar="ARRAY", help="The lengths of sequences (N, C, L), in an .npz file.")
@click.option(
    "--variants",
    default="none,batch",
    show_default=True,
    metavar="A,B,...",
    shell_complete=_complete,
    help=f"Of {', '.join(_KINDS)}, with a size as in ghost=16. The first is what the others are compared with.",
)
@click.option(
    "--lr", default="auto", show_default=True, metavar="A,B,...", callback=_rates, help="Rates to search; one is taken."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Seeds measured.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="The first of them."
)
@click.option("--budget", default="45s", show_default=True, metavar="TIME", help="For everything: 45s, 10m, 1h30m.")
@click.option("--steps", type=click.IntRange(min=4), metavar="N", help="Steps of a run, instead of a budget.")
@click.option(
    "--metric",
    metavar="NAME",
    help="accuracy, balanced-accuracy, loss, mse, mae, r2.  [default: accuracy, or r2]",
)
@click.option("--task", type=click.Choice(["classification", "regression"]), help="[default: told from the target]")
@click.option("--optimizer", type=click.Choice(["sgd", "adam", "adamw"]), default="sgd", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=2), default=64, show_default=True, metavar="N", help="Of files.")
@click.option("--image-size", type=click.IntRange(min=1), metavar="N", help="Side to which images are brought.")
@click.option("--raw", is_flag=True, help="Leave the features of a file as they are, not standardized.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The run's folder.  [default: runs/<now>]")
@click.option("--resume", is_flag=True, help="Go on with the interrupted comparison in --out.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1.  [default: CUDA where there is one]")
@click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Train what torch.compile makes of the model.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Side by side.")
@click.option("--ray", metavar="ADDRESS", help="A Ray cluster: auto, local, ray://host:10001. Each run is a trial.")
@click.option("--tensorboard", is_flag=True, help="Scalars into the folder, beside the records.")
@options.as_json
@click.pass_context
def compare(ctx: click.Context, /, out: Path | None, resume: bool, as_json: bool, **asked: Any) -> int:
    """Train a network with and without normalization on your data, each at its best learning rate, and say what that
    shows: a verdict with its uncertainty, steps, time and memory."""
    if resume and out is None:
        raise click.UsageError("--resume needs --out DIR, the folder of the comparison to go on with")
    given = [p.name for p in ctx.command.params if ctx.get_parameter_source(str(p.name)) == ParameterSource.COMMANDLINE]
    if resume and out is not None and (out / "config.toml").is_file() and not set(given) - set(_FREE):
        asked |= {key: value for key, value in _saved(out).items() if key not in _FREE}
    elif asked["data"] is None:
        raise click.UsageError("expected --data SRC, the data to compare on")
    _require_page_makers()
    folder = out or _fresh_folder()
    return _run(folder, resume, as_json, asked)


def _saved(out: Path) -> dict[str, Any]:
    """The options that the comparison in ``out`` was started with."""
    from batchnorm.study.comparison import CompareConfig

    words = shlex.split(CompareConfig.load(out / "config.toml").command)
    if words[:2] != ["batchnorm", "compare"]:
        raise InputError(f"{out} was not started by batchnorm compare: go on with bn.compare(..., resume=True)")
    return dict(compare.make_context("batchnorm compare", words[2:]).params)


def _run(folder: Path, resume: bool, as_json: bool, asked: dict[str, Any]) -> int:
    from batchnorm import report
    from batchnorm.cli.progress import watcher
    from batchnorm.report.page import PAGE
    from batchnorm.study.comparison import Deferred
    from batchnorm.study.comparison import compare as run

    model, source = asked["model"], asked["data"]
    names = ("batch_size", "target", "columns", "lengths", "task", "image_size")
    reading = {name: asked[name] for name in names} | {"standardize": False if asked["raw"] else None}
    data: Any = Deferred(functools.partial(_data, source, reading), Path(source).name if ":" not in source else source)
    measure = asked["metric"] or "validation"
    watch = watcher(sys.stderr if as_json else sys.stdout, folder, "comparison", measure)
    pages = _Pages(folder)

    def on_event(event: events.Event) -> None:
        watch.on_event(event)
        pages.on_event(event)

    try:
        with watch:
            comparison = run(
                None if model is None else Deferred(functools.partial(models.find, model), model),
                data,
                asked["variants"],
                asked["lr"],
                asked["seeds"],
                asked["budget"],
                **{name: asked[name] for name in ("steps", "metric", "optimizer", "seed", "device", "workers", "ray")},
                batch_size=asked["batch_size"],
                task=asked["task"],
                amp=asked["amp"],
                compile=asked["compiled"],
                tensorboard=asked["tensorboard"],
                out=folder,
                resume=resume,
                on_event=on_event,
                command=_command(asked),
            )
        page = report.build(comparison.summary, folder / PAGE)
    except KeyboardInterrupt:
        again = shlex.join(["batchnorm", "compare", "--resume", "--out", str(folder)])
        kept = f"{watch.finished} finished run{'' if watch.finished == 1 else 's'} kept in {folder}"
        click.echo(f"batchnorm: interrupted, {kept}; go on with: {again}", err=True)
        return 130
    _tell(comparison, folder, page, as_json)
    return 0


class _Pages:
    """Writes the page of what is there so far, now and then, for runs of hours."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, time.monotonic()

    def on_event(self, event: events.Event) -> None:
        from batchnorm.study.events import RunFinished

        if not isinstance(event, RunFinished) or time.monotonic() - self.last < _PAGE_EVERY:
            return
        from batchnorm import report

        with contextlib.suppress(BatchnormError):  # the page at the end will say what is wrong with pages
            report.rebuild(self.folder)
        self.last = time.monotonic()


def _data(source: str, reading: Mapping[str, Any]) -> Any:
    """The data of ``--data``, in whichever process."""
    from batchnorm.study.comparison.opening import open_data

    if ":" not in source or Path(source).exists():
        return open_data(source, **reading)
    for name in ("target", "columns", "lengths", "image_size"):
        if reading[name] is not None:
            raise InputError(f"--{name.replace('_', '-')} is for files: what {source} gives is taken as it is")
    found = models.find(source)
    if callable(found):
        with models.failures_told(source):
            found = found()
    opened = open_data(found, batch_size=reading["batch_size"], task=reading["task"])
    opened.label = source
    return opened


def _command(asked: Mapping[str, Any]) -> str:
    """The command that does it again: where it goes and how many workers do it makes no difference."""
    words = ["batchnorm", "compare"]
    for param in compare.params:
        value = asked.get(str(param.name))
        default = "auto" if param.name == "lr" else param.get_default(click.Context(compare))
        if param.name in _FREE or value in (None, False) or value == default:
            continue
        words.append(param.opts[0])
        if value is not True:
            many = isinstance(value, tuple)
            words.append(",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) if many else str(value))
    return shlex.join(words)


def _tell(comparison: Comparison, folder: Path, page: Path, as_json: bool) -> None:
    if as_json:
        document = {"run": str(folder), "page": str(page), **comparison.to_dict()}
        click.echo(json.dumps(document, indent=1, allow_nan=False))
        return
    from rich.text import Text

    from batchnorm.report.terminal import console_for, render

    console = console_for(sys.stdout)
    console.print()
    for note in comparison.config.notes:
        console.print(Text(f"- {note}"), soft_wrap=True)
    console.print()
    console.print(render(comparison.summary))
    for item in comparison.verdict.judgements:
        console.print(Text(item.text), soft_wrap=True)
    console.print(Text.assemble("The page: ", (str(page.resolve()), "bold")), soft_wrap=True)
