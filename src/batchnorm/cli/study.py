"""``batchnorm study``: run the experiments, watch them, and show what they found."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from batchnorm._errors import MissingDependencyError

if TYPE_CHECKING:
    from batchnorm.study import StudyConfig, Summary


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names of sections, parted by commas."""
    from batchnorm.study.config import SECTION_NAMES

    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names or ("",):
        if name not in SECTION_NAMES:
            known = ", ".join(SECTION_NAMES)
            raise click.BadParameter(f"unknown section {name!r}, expected some of {known}", ctx, param)
    return names


class _Sections(click.Option):
    """``--sections``, whose help names them all; they are looked up when the help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        from batchnorm.study.config import DEFAULT_SECTIONS, OPT_IN

        self.help = (
            f"Some of {', '.join(DEFAULT_SECTIONS)}; {' and '.join(OPT_IN)} need --data-dir.  [default: the former]"
        )
        return super().get_help_record(ctx)


def _complete_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the last of the names."""
    from batchnorm.study.config import SECTION_NAMES

    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in SECTION_NAMES if name.startswith(last)]


@click.command(
    short_help="Run the experiments and write their page.",
    epilog="""\b
Examples:
  batchnorm study                                    everything, into runs/ and the time of day
  batchnorm study --quick --out /tmp/look            a first look
  batchnorm study --sections headline,deep --seeds 10
  batchnorm study --resume --out runs/2026-01-31_12-00-00
  batchnorm study --full --sections mnist --data-dir ~/data/mnist --download
  batchnorm study --quick --json | jq .speedup_90.ratio.median

The folder then holds config.toml, records.jsonl, summary.json and report.html.""",
)
@click.option("--quick", is_flag=True, help="Fewer seeds, rates and steps: less than a minute.")
@click.option("--full", is_flag=True, help="More seeds, rates and steps: several minutes.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A study as TOML, e.g. a run's config.toml.",
)
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds per section.")
@click.option("--seed", type=click.IntRange(min=0), metavar="BASE", help="The first seed; the others follow it.")
@click.option(
    "--sections",
    metavar="A,B,...",
    callback=_names,
    shell_complete=_complete_names,
    cls=_Sections,
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The folder with the files of MNIST or CIFAR-10, as they are published.",
)
@click.option("--download", is_flag=True, help="Fetch into --data-dir what is missing there.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The run's folder.  [default: runs/<now>]")
@click.option("--resume", is_flag=True, help="Go on with the interrupted study in --out; finished runs are kept.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Runs side by side.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON document on stdout, progress on stderr.")
def study(
    quick: bool,
    full: bool,
    config_file: Path | None,
    seeds: int | None,
    seed: int | None,
    sections: tuple[str, ...] | None,
    data_dir: Path | None,
    download: bool,
    out: Path | None,
    resume: bool,
    workers: int | None,
    as_json: bool,
) -> int:
    """Measure on this machine what normalization does to a network, and write a page about it."""
    if quick + full + (config_file is not None) > 1:
        raise click.UsageError("--quick, --full and --config exclude each other")
    preset = "quick" if quick else "full" if full else "default"
    if resume and out is None:
        raise click.UsageError("--resume needs --out DIR, the folder of the study to go on with")
    _require_page_makers()
    from batchnorm.report.page import saved_command

    if download and data_dir is None and config_file is None and not resume:
        raise click.UsageError("--download needs --data-dir DIR, the folder to fetch into")
    choices = (config_file, seeds, seed, sections, data_dir)
    asked = preset != "default" or any(choice is not None for choice in choices)
    # A study that goes on keeps its own configuration, unless it was told one, which then has to be the same.
    config = (
        _config(preset, config_file).with_options(
            seed=seed,
            seeds=seeds,
            sections=sections,
            # Absolute: the study may be gone on with from elsewhere.
            data_dir=None if data_dir is None else str(data_dir.expanduser().absolute()),
        )
        if asked or not resume
        else None
    )
    folder = out or _fresh_folder()
    command = _command(preset, config_file, seeds, seed, sections, data_dir) if config else saved_command(folder)
    return _run(config, folder, resume, workers, download, as_json, command)


def _run(
    config: StudyConfig | None,
    folder: Path,
    resume: bool,
    workers: int | None,
    download: bool,
    as_json: bool,
    command: str,
) -> int:
    from batchnorm import report
    from batchnorm.cli.progress import watcher
    from batchnorm.report.page import PAGE
    from batchnorm.study import run_study

    stream = sys.stderr if as_json else sys.stdout
    watch = watcher(stream, folder)
    try:
        with watch:
            summary = run_study(
                config,
                folder,
                resume=resume,
                workers=workers,
                download=download,
                on_event=watch.on_event,
                command=command,
            )
        page = report.build(summary, folder / PAGE)
    except KeyboardInterrupt:
        again = shlex.join(["batchnorm", "study", "--resume", "--out", str(folder)])
        kept = f"{watch.finished} finished run{'' if watch.finished == 1 else 's'} kept in {folder}"
        click.echo(f"batchnorm: interrupted, {kept}; go on with: {again}", err=True)
        return 130
    _tell(summary, folder, page, as_json)
    return 0


def _tell(summary: Summary, folder: Path, page: Path, as_json: bool) -> None:
    if as_json:
        document = {"run": str(folder), "page": str(page), **json.loads(summary.to_json())}
        click.echo(json.dumps(document, indent=1, allow_nan=False))
        return
    from rich.text import Text

    from batchnorm.report.terminal import console_for, render

    console = console_for(sys.stdout)
    console.print()
    console.print(render(summary))
    console.print(Text.assemble("The page: ", (str(page.resolve()), "bold")), soft_wrap=True)


def _config(preset: str, config_file: Path | None) -> StudyConfig:
    from batchnorm.study.config import PRESETS, StudyConfig

    return StudyConfig.load(config_file) if config_file is not None else PRESETS[preset]


def _command(
    preset: str,
    config_file: Path | None,
    seeds: int | None,
    seed: int | None,
    sections: tuple[str, ...] | None,
    data_dir: Path | None,
) -> str:
    """The command that gives the same records: where they go and how many workers do it makes no difference."""
    words = ["batchnorm", "study"]
    words += [f"--{preset}"] if preset != "default" else []
    words += ["--config", str(config_file)] if config_file is not None else []
    words += ["--seeds", str(seeds)] if seeds is not None else []
    words += ["--seed", str(seed)] if seed is not None else []
    words += ["--sections", ",".join(sections)] if sections is not None else []
    words += ["--data-dir", str(data_dir)] if data_dir is not None else []
    return shlex.join(words)


def _fresh_folder() -> Path:
    base = Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = base
    count = 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder


def _require_page_makers() -> None:
    """Missing packages are named before the study has taken its minutes, not after."""
    for name in ("plotly", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"the study's page needs {name}, which is not installed: pip install 'batchnorm[report]'"
            )
