"""The group of commands, and how its errors end.

torch, plotly and scikit-learn are imported by the commands that need them, when they run: ``--help`` and ``--version``
answer at once.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from batchnorm import __version__
from batchnorm._errors import BatchnormError
from batchnorm.cli.compare import compare
from batchnorm.cli.completion import completion
from batchnorm.cli.doctor import doctor
from batchnorm.cli.fit import fit
from batchnorm.cli.fold import fold
from batchnorm.cli.inspect import inspect
from batchnorm.cli.merge import merge
from batchnorm.cli.recalibrate import recalibrate
from batchnorm.cli.report import report
from batchnorm.cli.selftest import selftest
from batchnorm.cli.study import study
from batchnorm.cli.transform import transform

INTERRUPTED = 130


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  batchnorm fit train.parquet --out stats.safetensors
  batchnorm transform test.parquet --stats stats.safetensors --out normalized.parquet
  batchnorm inspect stats.safetensors    what was learned, and what is suspicious in it
  batchnorm doctor package:make_model    what is wrong with a model's batch norms
  batchnorm study                        the whole study, in under two minutes, and its page
  batchnorm study --quick                a first look, in less than a minute
  batchnorm compare --data wine.csv --target class    would it help on these data, and what does it cost
  batchnorm report runs/2026-01-31_12-00-00
  batchnorm selftest                     which implementations run here, and how exact they are

Exit codes: 0 done, 1 an error, 2 wrong usage, 3 the doctor found something, 130 interrupted.""",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Normalization for PyTorch: of data of any size, and what it does to a network, measured on this machine."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (
    fit,
    transform,
    merge,
    inspect,
    doctor,
    recalibrate,
    fold,
    study,
    compare,
    report,
    selftest,
    completion,
)
for command in COMMANDS:
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``batchnorm`` with ``arguments`` (default: the command line's) and exit."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Unicode gets a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code = _run(arguments)
    if code == INTERRUPTED and arguments is None:
        # CPython remembers an interrupt that went through an exec(), as imports of torch are full of, and would then
        # die of the signal after all. The exit code is a promise, so leave past that memory, tidied up as usual.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    words = None if arguments is None else list(arguments)
    try:
        code = cli.main(args=words, prog_name="batchnorm", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        # In the contexts' names, not in the file's, so that `python -m batchnorm` says the same.
        path = error.ctx.command_path if error.ctx else "batchnorm"
        return _fail(f"{error.format_message()} (see {path} --help)", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read us has left (`batchnorm ... | head`); at exit Python would complain about the pipe once more.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BatchnormError as error:
        return _fail(str(error), 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    # One line, whatever an inner message holds: logs and scripts read it by the line.
    click.echo(f"batchnorm: {' '.join(message.split())}", err=True)
    return code
