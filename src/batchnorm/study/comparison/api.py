"""``bn.compare``: would a normalization help this network on these data?"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from batchnorm._checks import check_choice
from batchnorm._errors import InputError
from batchnorm.probes.feeding import ForwardFn
from batchnorm.study.comparison import opening, session, settings, variants
from batchnorm.study.comparison.building import Deferred, label
from batchnorm.study.comparison.data import Data
from batchnorm.study.comparison.job import OPTIMIZERS, Job
from batchnorm.study.comparison.models import Default, default_for
from batchnorm.study.comparison.objective import Loss, objective
from batchnorm.study.comparison.result import Comparison
from batchnorm.study.comparison.settings import CompareConfig
from batchnorm.study.folder import RunFolder
from batchnorm.study.pool import Pool
from batchnorm.study.underway import OnEvent

PLAIN = ("none", "batch")


def compare(
    model_factory: Any,
    data: Any,
    variants: Sequence[Any] | Mapping[str, Any] | str = PLAIN,
    lrs: str | float | Sequence[float] = "auto",
    seeds: int = 3,
    budget: str | float = "45s",
    *,
    steps: int | None = None,
    metric: str | Callable[..., Any] | None = None,
    higher_is_better: bool | None = None,
    loss: Loss | None = None,
    task: str | None = None,
    target: str | None = None,
    columns: Sequence[str] | None = None,
    lengths: str | None = None,
    standardize: bool | None = None,
    image_size: int | None = None,
    optimizer: str | Callable[[Any, float], torch.optim.Optimizer] = "sgd",
    batch_size: int = 64,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    amp: bool | str = False,
    compile: bool = False,
    workers: int = 1,
    ray: str | None = None,
    tensorboard: bool | str | Path = False,
    checkpoint_every: float = 30.0,
    on_event: OnEvent | None = None,
    command: str = "",
) -> Comparison:
    r"""Train a network with and without normalization, each at its best learning rate, and say what that shows.

    1. What a step of each variant costs is measured side by side: time and memory. From it follows, once, how many
       steps a run has, so that everything fits the budget.
    2. The learning rate is searched for each variant by successive halving over the same rates, with the same steps, on
       validation data. The search has a seed of its own.
    3. Each variant is trained at its rate with ``seeds`` seeds. Test data are looked at where validation is best, and
       nothing is chosen by them.

    Variants have the same initial weights (by name and shape) and the same batches in the same order, seed by seed, so
    that differences are paired. The rate is constant through a run.

    Args:
        model_factory: a function of the normalization (itself a function of the number of features that gives a module;
            an argument called ``norm`` or ``norm_layer``, or the only required one); a function without arguments, or a
            module: then its batch norms are replaced, or where it has none inserted before the non-linearities; None
            for a default network. A module's own weights are where every seed begins.
        data: three DataLoaders (train, validation, test), or two, the second of which is shared out; arrays (X, y) or
            (X, lengths, y), split 60/20/20; or a path: CSV, Parquet, Arrow or NPZ with ``target``, or a folder of
            images with a folder for each class. Batches are (inputs, target), (x, lengths, target), or a mapping with
            its target under ``labels``, ``target`` or ``y``.
        variants: names: none, batch, torch, renorm, ghost, group, layer, instance, iternorm, decorrelated; with a size
            as in ``ghost=16``; functions of the number of features; or a mapping of names to these. The first is what
            the others are compared with.
        lrs: "auto" for a grid of half-decades (decades, where the budget is small), or the rates. A single one is taken
            without a search.
        seeds: how many are measured; ``seed`` is the first.
        budget: seconds, or as in "45s", "10m", "1h30m".
        steps: of a measured run, instead of a budget.
        metric: accuracy, balanced-accuracy, loss, mse, mae or r2; or a function of outputs and targets, which are those
            of a whole part (``higher_is_better`` then says which way). Default accuracy, or r2.
        loss: a function of output and target; default cross-entropy or mean squared error.
        task: "classification" or "regression"; told from the target by default, and said in the notes.
        target, columns, lengths: names in a file: of the target, the features, the lengths of sequences (NPZ).
        standardize: features of a file by the mean and deviation of the training part; True by default.
        image_size: side to which images are brought.
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", or a function of parameters and rate.
        batch_size: of arrays and files.
        forward_fn: ``forward_fn(model, batch)`` where the model is not called with the inputs.
        out: the folder of the run: config.toml, records.jsonl, summary.json, and states while it runs. None keeps
            nothing.
        resume: go on with the comparison in ``out``: finished runs are not repeated, one that was interrupted goes on
            from its last checkpoint, and the records come out the same.
        device: default CUDA where there is one.
        amp: True or "bf16", or "fp16" (CUDA, with scaled gradients).
        compile: train ``torch.compile(model)``.
        workers: processes side by side, between which the cores are shared.
        ray: the address of a Ray cluster ("auto", "local", "ray://..."): each run is then a trial of Ray Tune.
        tensorboard: True for ``out``/tensorboard, or a folder.
        checkpoint_every: seconds between checkpoints within a run.
        on_event: called with each :class:`batchnorm.study.events.Event`.
        command: the command line to show.

    Returns:
        A :class:`Comparison`: ``verdict``, ``records``, ``summary``, ``table()``, ``to_dict()``, ``to_html()``.

    Raises:
        InputError: (ValueError) an argument that makes no sense; an output that does not fit the target; a budget that
            is too small (the message says what would do); too few test samples; inputs that are not finite.
        SurgeryError: the model has no place for a normalization.
        RecordsError, ConfigError, OutputError: as :func:`batchnorm.study.run_study`.

    Sources: Ioffe & Szegedy (2015), section 4; Jamieson & Talwalkar (2016) for the search.
    """
    _check(seeds, steps, batch_size, workers, task, resume, out, optimizer)
    chosen = _device(device)
    precision = _amp(amp, chosen)
    source = model_factory
    opener = _opener(data, batch_size, target, columns, lengths, task, standardize, image_size)
    opened: Data = opener()
    if not opened.task:
        opening.check_loaded(opened)
    size = opened.batch_size or len(next(opened.stream(0)))
    named = _variants(variants, size)
    found_task, classes, why = _task(opened, task)
    goal = objective(found_task, classes, metric, loss, higher_is_better)
    notes = [*opened.notes, *([why] if why else [])]
    if source is None:
        source = _default(opened, found_task, classes)
        notes.append(source.description)
    job = Job(
        source=source,
        data_source=data if isinstance(data, Deferred) else opened,
        variants=named,
        objective=goal,
        optimizer=optimizer,
        forward_fn=forward_fn,
        device=chosen,
        amp=precision,
        compile=compile,
        threads=_threads(workers),
        checkpoint_every=checkpoint_every,
    )
    job._loaded["data"] = opened
    with job.computing(seed):
        notes.append(job.builder.note())
    config = CompareConfig(
        model=job.builder.label if not isinstance(source, Deferred) else source.label,
        data=data.label if isinstance(data, Deferred) else opened.label,
        variants=tuple(variant.name for variant in named),
        lrs=settings.rates(lrs, optimizer if isinstance(optimizer, str) else "sgd"),
        auto=lrs == "auto",
        seeds=seeds,
        seed=seed,
        budget=0.0 if steps else settings.seconds(budget),
        steps=steps or 0,
        metric=goal.metric,
        higher=goal.higher,
        task=found_task,
        classes=classes,
        optimizer=optimizer if isinstance(optimizer, str) else label(optimizer),
        batch_size=size,
        device=chosen,
        amp=precision,
        compile=compile,
        workers=workers,
        threads=job.threads,
        samples=opened.samples(),
        fingerprint=fingerprint(opened, job, seed),
        notes=tuple(notes),
        command=command or "bn.compare(...)",
    )
    return run(config, job, out, resume=resume, workers=workers, ray=ray, tensorboard=tensorboard, on_event=on_event)


def run(
    config: CompareConfig,
    job: Job,
    out: str | Path | None,
    *,
    resume: bool = False,
    workers: int = 1,
    ray: str | None = None,
    tensorboard: bool | str | Path = False,
    on_event: OnEvent | None = None,
) -> Comparison:
    """Do what ``config`` says with ``job``; see :func:`compare`."""
    with tempfile.TemporaryDirectory(prefix="batchnorm-compare-") as scratch:
        folder = RunFolder(Path(out if out is not None else scratch))
        made = not folder.path.exists()
        config, found, going_on = session.begin(folder, config, resume)
        job.states = folder.path / session.STATES
        job.states.mkdir(exist_ok=True)
        if tensorboard:
            job.tensorboard = folder.path / "tensorboard" if tensorboard is True else Path(tensorboard)
        pool: Pool | None = None
        if ray is not None:
            from batchnorm.study.comparison.raytune import TunePool

            pool = TunePool(ray, job)
        state = session.Session(folder, config, found, job, on_event)
        try:
            state.go(workers, pool)
        except InputError:
            # What was refused at once has left nothing that could be gone on with.
            if not going_on and not state.known:
                _clear(folder, made)
            raise
        finally:
            job.data.restore()
        comparison = Comparison.load(folder.path)
        folder.write_summary(comparison.summary)
    return comparison


def _clear(folder: RunFolder, whole: bool) -> None:
    for path in (folder.config_file, folder.records_file):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder.path / session.STATES, ignore_errors=True)
    if whole:
        with contextlib.suppress(OSError):
            folder.path.rmdir()


def _opener(data: Any, batch_size: int, *options: Any) -> Callable[[], Data]:
    """How to open ``data``, now or in another process."""
    names = ("target", "columns", "lengths", "task", "standardize", "image_size")
    if isinstance(data, Deferred):
        return data.load
    return lambda: opening.open_data(data, batch_size=batch_size, **dict(zip(names, options, strict=True)))


def _check(
    seeds: int,
    steps: int | None,
    batch_size: int,
    workers: int,
    task: str | None,
    resume: bool,
    out: Any,
    optimizer: Any,
) -> None:
    for name, value, least in (("seeds", seeds, 1), ("batch_size", batch_size, 2), ("workers", workers, 1)):
        if value < least:
            raise InputError(f"expected {name} of {least} or more, got {value}")
    if steps is not None and steps < 4:
        raise InputError(f"expected 4 steps or more, got {steps}")
    if task is not None:
        check_choice("task", task, ("classification", "regression"))
    if isinstance(optimizer, str):
        check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    if resume and out is None:
        raise InputError("expected out= with resume=True, the folder of the comparison to go on with")


def _variants(wanted: Any, size: int) -> tuple[variants.Variant, ...]:
    return variants.read(wanted, size)


def _task(data: Data, task: str | None) -> tuple[str, int, str]:
    found, classes, why = opening.classes_of(data)
    if task is None or task == found:
        return found, classes, why
    if task == "classification":
        raise InputError("expected integer targets for task='classification', got others: number the classes from 0")
    return task, 0, "Regression, as asked for."


def _default(data: Data, task: str, classes: int) -> Default:
    batch = next(data.stream(0))
    outputs = classes if task == "classification" else max(1, batch.target[0].numel())
    return default_for(batch, outputs)


def _device(device: str | None) -> str:
    if device is None or device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"cannot use the device {device!r} here: {str(error).splitlines()[0]}") from error
    return str(found)


def _amp(amp: bool | str, device: str) -> str:
    if amp is False or amp in ("", "off"):
        return ""
    found = "bf16" if amp is True else amp
    check_choice("amp", found, ("bf16", "fp16"))
    if found == "fp16" and not device.startswith("cuda"):
        raise InputError(f"amp='fp16' needs CUDA, got the device {device!r}: take 'bf16'")
    return str(found)


def _threads(workers: int) -> int:
    """Of each run; 0 is to be found out."""
    if workers == 1:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def fingerprint(data: Data, job: Job, seed: int) -> str:
    """Of the data and of the initial weights of the reference."""
    digest = hashlib.sha256(data.fingerprint().encode())
    with job.computing(seed):
        model, _ = job.build(job.variants[0].name, seed)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
