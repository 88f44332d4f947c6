"""Running averages of the statistics of ghosts, one after the other; of a whole batch, which is one ghost."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.ops.triton.kernels.statistics import move_running


@triton.jit
def update(
    running_mean, running_var, mean, var, count, num_batches, channels, ghosts, stride, ddof, momentum: tl.float64,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``update_running`` of each ghost in its turn; ``num_batches`` has already counted those with a real value."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = c < channels
    batches = tl.zeros((1,), tl.float64)
    if num_batches is not None:
        batches += tl.load(num_batches).to(tl.float64)
        for ghost in range(ghosts):
            batches -= (tl.load(count + ghost * stride) > 0).to(tl.float64)
    for ghost in range(ghosts):
        n = tl.load(count + ghost * stride)
        at = tl.cast(ghost, tl.int64) * stride + c
        step = batches * 0.0 + momentum
        if num_batches is not None:
            batches += (n > 0).to(tl.float64)
            step = 1.0 / tl.where(batches > 0, batches, 1.0)
        batch_mean = tl.load(mean + at, mask=exists, other=0.0)
        batch_var = tl.load(var + at, mask=exists, other=0.0)
        move_running(running_mean, running_var, c, exists, batch_mean, batch_var, n + c * 0.0, step, ddof)
        tl.debug_barrier()  # the next ghost reads what this one wrote
