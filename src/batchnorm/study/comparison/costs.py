"""What a step of each variant costs, in time and memory, measured side by side before anything is planned."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm._errors import BatchnormError, InputError
from batchnorm.study.comparison import state
from batchnorm.study.comparison.data import Batch
from batchnorm.study.comparison.job import Job, scaler, step, synchronized
from batchnorm.study.plan import Run
from batchnorm.study.records import Record

RUN = "calibrate"
MOST_ROUNDS = 30


@dataclass
class _Arm:
    model: nn.Module
    called: Any
    optimizer: Any
    scale: Any
    batches: Any
    first: float = 0.0
    seconds: tuple[float, ...] = ()
    start: float = 0.0


def calibrate(job: Job, lr: float, seconds: float, seed: int) -> list[Record]:
    """The records of section "calibrate": what the variants cost.

    For each variant ``seconds`` of a step, of an evaluation, of the first step (with its compilation), of the start of
    a run (making the model, writing it once), and ``memory``; and ``threads``, where the job leaves them to be found.

    Rounds of one step of each variant in turn, so that what disturbs the machine disturbs all alike; the median of the
    rounds after the second. Memory is that of one step: on CUDA the allocator's peak with nothing but this model and
    its optimizer; elsewhere the bytes that autograd keeps for the backward pass, parameters and inputs not counted.

    Raises:
        InputError: the model does not run on a batch, its output does not fit the target, or its first loss is none.
    """
    runs = {variant.name: Run(RUN, "calibrate", variant.name, seed, 0, 0.0) for variant in job.variants}
    lines: list[Record] = []
    if not job.threads:
        job.threads = fastest(job, lr, seed)
    with job.computing(seed):
        check(job, seed)
        for name, run in runs.items():
            lines.append(run.record(0, "memory", memory(job, name, lr, seed), what=_memory_kind(job)))
        arms = {name: _arm(job, name, lr, seed) for name in runs}
        for arm in arms.values():
            arm.first = _timed(job, arm)
        begun = time.perf_counter()
        for number in range(MOST_ROUNDS):
            for arm in arms.values():
                arm.seconds = (*arm.seconds, _timed(job, arm))
            if number >= 2 and time.perf_counter() - begun > seconds:
                break
        for name, arm in arms.items():
            begun = time.perf_counter()
            job.evaluate(arm.model, "validation")
            evaluation = time.perf_counter() - begun
            kept = arm.seconds[2:] or arm.seconds
            for what, value in (
                ("step", statistics.median(kept)),
                ("evaluation", evaluation),
                ("first step", arm.first),
                ("start", arm.start),
            ):
                lines.append(runs[name].record(0, "seconds", round(value, 7), what=what))
    first = runs[job.variants[0].name]
    return [*lines, first.record(0, "threads", job.threads), first.finished(0)]


def fastest(job: Job, lr: float, seed: int) -> int:
    """The number of torch's threads with which a step of the first variant is the faster: all of them, or one.

    For a small network the threads' meeting costs more than they save, the more so on a machine that is not idle.
    """
    most = torch.get_num_threads()
    if most == 1 or job.device != "cpu":
        return most
    best: dict[int, float] = {}
    with job.computing(seed):
        check(job, seed)
        arm = _arm(job, job.variants[0].name, lr, seed)
        for _ in range(3):
            for count in (most, 1):
                torch.set_num_threads(count)
                best[count] = min([best.get(count, math.inf), *(_timed(job, arm) for _ in range(2))])
    return min(best, key=lambda count: best[count])


def check(job: Job, seed: int) -> None:
    """Run each variant once, forward, as training does; say what is wrong before the work and not after it.

    Raises:
        InputError: see :func:`calibrate`.
    """
    batch = next(job.stream(seed))
    _check_inputs(batch)
    for variant in job.variants:
        model, _ = job.build(variant.name, seed)
        model.train()
        there = batch.to(torch.device(job.device))
        try:
            loss = job.first_loss(model, there)
        except BatchnormError:
            raise
        except Exception as error:
            raise InputError(
                f"{job.label} with {variant.name} does not run on a batch of {_shapes(batch)}: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error
        if not math.isfinite(float(loss.detach())):
            raise InputError(
                f"expected a finite loss before the first step, got {float(loss.detach())} of {job.label} with "
                f"{variant.name} on finite inputs: look at its initial weights and the scale of the inputs"
            )


def memory(job: Job, name: str, lr: float, seed: int) -> int:
    """Bytes of one training step, see :func:`calibrate`."""
    model, _ = job.build(name, seed)
    model.train()
    batch = next(job.stream(seed)).to(torch.device(job.device))
    if job.device.startswith("cuda"):
        optimizer, scale = job.make_optimizer(model, lr), scaler(job)
        step(job, model, optimizer, scale, batch)
        synchronized(job.device)
        torch.cuda.reset_peak_memory_stats(job.device)
        step(job, model, optimizer, scale, batch)
        synchronized(job.device)
        return int(torch.cuda.max_memory_allocated(job.device))
    known = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
    known |= {_address(leaf) for leaf in pytree.tree_leaves((batch.inputs, batch.target)) if isinstance(leaf, Tensor)}
    found: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta" and _address(tensor) not in known:
            found[_address(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # or its address might be given to the next one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = job.loss(model, batch)
    del loss
    return sum(found.values())


def _memory_kind(job: Job) -> str:
    return "peak on the device" if job.device.startswith("cuda") else "kept for the backward pass"


def _arm(job: Job, name: str, lr: float, seed: int) -> _Arm:
    begun = time.perf_counter()
    model, _ = job.build(name, seed)
    model.train()
    arm = _Arm(model, job.compiled(model), job.make_optimizer(model, lr), scaler(job), job.stream(seed))
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder) / "state", state.Progress(""), model, arm.optimizer, arm.scale, job.device)
    arm.start = time.perf_counter() - begun
    return arm


def _timed(job: Job, arm: _Arm) -> float:
    begun = time.perf_counter()
    try:
        step(job, arm.called, arm.optimizer, arm.scale, next(arm.batches).to(torch.device(job.device)))
    except BatchnormError:
        raise
    except Exception as error:
        where = "torch.compile fails" if job.compile else "a step of training fails"
        raise InputError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    synchronized(job.device)
    return time.perf_counter() - begun


def _check_inputs(batch: Batch) -> None:
    for tensor in pytree.tree_leaves(batch.inputs):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).reshape(len(tensor), -1).any(1).sum()) if tensor.dim() else 1
            raise InputError(
                f"expected finite inputs, got NaN or inf in {bad} of the {len(batch)} samples of the first batch: fill "
                "or drop them"
            )
    if batch.target.is_floating_point() and not batch.target.isfinite().all():
        raise InputError("expected finite targets, got NaN or inf in the first batch: drop those samples")


def _shapes(batch: Batch) -> str:
    found = [f"{list(leaf.shape)}" for leaf in pytree.tree_leaves(batch.inputs) if isinstance(leaf, Tensor)]
    return " and ".join(found) or "inputs"


def _address(tensor: Any) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):
        return id(tensor)
