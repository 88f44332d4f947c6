"""``batchnorm fit``: statistics of data of any size."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from batchnorm.cli import options

METHODS = ("standard", "minmax", "center", "pca", "zca", "cholesky", "pca-cor", "zca-cor")
WHITENERS = METHODS[3:]


def _count_or_share(ctx: click.Context, param: click.Parameter, value: str | None) -> int | float | None:
    if value is None:
        return None
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        message = f"expected a number of components, or a share of the variance such as 0.95, got {value!r}"
        raise click.BadParameter(message, ctx, param) from None


def _shrinkage(ctx: click.Context, param: click.Parameter, value: str | None) -> str | float | None:
    if value is None or value == "ledoit-wolf":
        return value
    try:
        return float(value)
    except ValueError:
        message = f"expected ledoit-wolf or a number from 0 to 1, got {value!r}"
        raise click.BadParameter(message, ctx, param) from None


def _range(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = (float(end) for end in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected two numbers parted by a comma, got {value!r}", ctx, param) from None
    return low, high


@click.command(
    short_help="Learn statistics from files of any size.",
    epilog="""\b
Examples:
  batchnorm fit train.npy --out stats.safetensors
  batchnorm fit train.parquet --columns age,income --weights w --out stats.safetensors
  batchnorm fit 'data/*.csv' --exclude id,label --method minmax --range 0,1 --out stats.safetensors
  batchnorm fit images/ --channel-axis 1 --out stats.safetensors
  batchnorm fit train.npy --method pca --n-components 0.95 --out whiten.safetensors
  batchnorm fit monday.npy --continue stats.safetensors --out stats2.safetensors
  batchnorm fit data/ --ray auto --out stats.safetensors           on the workers of a Ray cluster

Methods: standard (mean 0, deviation 1), minmax (a range), center (mean 0); whitening: pca, zca,
cholesky, and pca-cor, zca-cor, which standardize first. See batchnorm transform for their use.""",
)
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=click.Path())
@click.option("--method", type=click.Choice(METHODS), help="What to learn.  [default: standard]")
@options.statistics_out()
@options.columns
@click.option("--exclude", metavar="A,B,...", callback=options.names, help="All columns but these are the features.")
@click.option("--weights", metavar="COLUMN", help="The column with the weight of each row.")
@options.batch_rows
@click.option("--continue", "known", type=click.Path(path_type=Path), metavar="FILE", help="Go on from statistics.")
@click.option("--channel-axis", type=int, metavar="N", help="Statistics per channel; 1 for images (N, C, H, W).")
@click.option("--range", "feature_range", metavar="A,B", callback=_range, help="Of minmax.  [default: -1,1]")
@click.option("--clip", is_flag=True, help="Of minmax: hold new data in the range.")
@click.option("--n-components", metavar="N|SHARE", callback=_count_or_share, help="Directions to keep, in whitening.")
@click.option("--shrinkage", metavar="S", callback=_shrinkage, help="Of the covariance: ledoit-wolf, or 0 to 1.")
@click.option("--eps", type=float, metavar="E", help="Added to each variance, in whitening.")
@click.option(
    "--solver", type=click.Choice(["auto", "eigh", "gram", "randomized"]), help="Of whitening, for wide data."
)
@click.option("--ray", metavar="ADDRESS", help="Fit on a Ray cluster: auto, local, or its address.")
@options.force
@options.as_json
def fit(
    sources: tuple[str, ...],
    method: str | None,
    out: Path,
    columns: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    weights: str | None,
    batch_rows: int | None,
    known: Path | None,
    channel_axis: int | None,
    feature_range: tuple[float, float] | None,
    clip: bool,
    n_components: int | float | None,
    shrinkage: str | float | None,
    eps: float | None,
    solver: str | None,
    ray: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Read the files SRC once, in blocks, and write what was learned to --out.

    SRC is a file, a folder or a 'pattern': .npy, .npz, .safetensors, .parquet, .arrow, .feather, .csv, .tsv, or a
    folder of images. Memory does not grow with the data. NaN and empty fields are left out.
    """
    if columns and exclude:
        raise click.UsageError("--columns and --exclude exclude each other")
    settings = {
        "feature_range": feature_range,
        "clip": clip or None,
        "n_components": n_components,
        "shrinkage": shrinkage,
        "eps": eps,
        "solver": solver,
        "channel_axis": channel_axis,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if ray is not None and batch_rows is not None:
        raise click.UsageError("--batch-rows is not for --ray, which has blocks of its own")
    _check_usage(method, known, given)
    options.refuse_existing(
        out, force or (known is not None and out.exists() and known.exists() and out.samefile(known))
    )
    estimator = _estimator(method or "standard", given) if known is None else _load(known)
    if exclude:
        columns = _without(sources, (*exclude, *((weights,) if weights else ())))
    began = time.perf_counter()
    with options.warnings_told():
        if ray is not None:
            rows = None
            _fit_on_ray(estimator, sources, columns, weights, ray)
        else:
            rows = _fit_here(estimator, sources, columns, weights, batch_rows)
        estimator.save(out)
    _tell(estimator, out, rows, time.perf_counter() - began, as_json)


def _check_usage(method: str | None, known: Path | None, given: dict[str, Any]) -> None:
    if known is not None and (method is not None or given):
        raise click.UsageError("--continue keeps the method and the settings of its file: leave them out")
    words = {"n_components": "--n-components", "feature_range": "--range", "channel_axis": "--channel-axis"}
    for name in given:
        meant = ("minmax",) if name in ("feature_range", "clip") else WHITENERS
        if name != "channel_axis" and (method or "standard") not in meant:
            raise click.UsageError(f"{words.get(name, '--' + name)} is for --method {' or '.join(meant)}")


def _estimator(method: str, given: dict[str, Any]) -> Any:
    from batchnorm import preprocessing

    if method in WHITENERS:
        return preprocessing.Whitener(method, **given)
    kinds = {"standard": "StandardScaler", "minmax": "MinMaxScaler", "center": "MeanSubtractor"}
    return getattr(preprocessing, kinds[method])(**given)


def _load(known: Path) -> Any:
    from batchnorm.preprocessing import load

    return load(known)


def _without(sources: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[str, ...]:
    from batchnorm._errors import InputError
    from batchnorm.preprocessing.sinks.reading import columns_of
    from batchnorm.preprocessing.sources.columns import near
    from batchnorm.preprocessing.sources.paths import find_files

    _, files, _ = find_files(list(sources))
    present = columns_of(Path(files[0]))
    for name in exclude:
        if name not in present:
            raise InputError(f"{files[0]}: no column {name!r}{near(name, present)}")
    return tuple(name for name in present if name not in exclude)


def _fit_here(
    estimator: Any,
    sources: tuple[str, ...],
    columns: tuple[str, ...] | None,
    weights: str | None,
    batch_rows: int | None,
) -> int:
    from batchnorm.preprocessing.sources import open_source

    source = open_source(list(sources), columns=columns, weights=weights, batch_rows=batch_rows)
    size = source.size
    with options.Meter(f"fit {source.label}", lambda: (source.read_bytes, size) if size else None) as meter:
        source.progress = meter
        if hasattr(estimator, "n_features_in_"):
            estimator.partial_fit(source)
        else:
            estimator.fit(source)
    return meter.rows


def _fit_on_ray(
    estimator: Any, sources: tuple[str, ...], columns: tuple[str, ...] | None, weights: str | None, address: str
) -> None:
    from sklearn.base import clone

    from batchnorm.preprocessing.distributed import fit_files_on_ray

    options.quiet_ray()
    # A fit forgets: what was known before is merged with what the cluster learns.
    fresh = clone(estimator)
    fit_files_on_ray(fresh, list(sources), columns=columns, weights=weights, address=address)
    estimator.merge(fresh)


def _tell(estimator: Any, out: Path, rows: int | None, seconds: float, as_json: bool) -> None:
    from batchnorm.preprocessing.describing import describe

    found = describe(estimator)
    document = {
        "file": str(out),
        "estimator": found.estimator,
        "parameters": found.parameters,
        "rows": rows,
        "samples": found.samples,
        "features": found.features,
        "seconds": round(seconds, 3),
        "constant": found.named("constant"),
        "empty": found.named("empty"),
    }
    if as_json:
        click.echo(json.dumps(document, indent=1, allow_nan=False))
        return
    from batchnorm.cli.statistics import facts

    rate = f" ({rows / seconds:,.0f} rows a second)" if rows and seconds >= 0.05 else ""
    lines = {
        "learned": found.title,
        "rows": "" if rows is None else f"{rows:,}",
        # Other than the rows where values are missing, weighted, or learned before.
        "samples": "" if rows is not None and found.samples_text == f"{rows:,}" else found.samples_text,
        "features": f"{found.features:,}",
        "time": f"{seconds:.2f} s{rate}",
        "constant": found.listed("constant"),
        "without values": found.listed("empty"),
        "written to": str(out),
    }
    facts(sys.stdout, {name: text for name, text in lines.items() if text})
