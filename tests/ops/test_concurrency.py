"""Kernels under several threads, of torch's and of Python's, after a fork, and on more data than 32 bits can count."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from batchnorm.ops import reference
from ops.steps import EPS, assert_same, exact, ours

HUGE = "BATCHNORM_TEST_HUGE"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def threads():
    """A function that sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("shape", [(16, 24, 28, 28), (300, 40, 1, 1), (8, 3, 130, 70)], ids=str)
def test_the_number_of_threads_may_change_between_calls(shape, memory_format, threads):
    x = (torch.randn(shape) + 5).contiguous(memory_format=memory_format)
    grad, residual, mask = torch.randn_like(x), torch.randn_like(x), torch.rand(shape[0], *shape[2:]) > 0.2
    expected = exact(x, grad, residual=residual, mask=mask)
    seen = {}
    for count in (1, 4, 2, 3, 1, 2, 4, 3):
        threads(count)
        results = ours(x, grad, residual=residual, mask=mask)
        torch.testing.assert_close(results[1:3], expected[1:3], rtol=1e-12, atol=1e-12)
        assert_same(results, expected, rtol=1e-4, atol=1e-4)
        same = seen.setdefault(count, results)
        assert all(torch.equal(a, b) for a, b in zip(results, same, strict=True)), "the same for the same number"
    threads(3)
    saved = torch.ops.batchnorm.train_forward(x, None, None, None, None, EPS, "relu")
    threads(2)  # the backward may have other threads than its forward
    _, count, mean, _, invstd, sign = saved
    rest = (mean, invstd, None, None, None, sign, None, "relu", count, False)
    assert_same(
        torch.ops.batchnorm.train_backward(grad, x, *rest), reference.train_backward(grad, x, *rest), 1e-4, 1e-4
    )


def test_several_python_threads_at_once():
    shapes = [(64, 33), (4, 7, 30, 30), (300, 5), (2, 130, 9, 9)] * 4
    data = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    serial = [ours(x, grad, residual=grad) for x, grad in data]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            at_once = list(pool.map(lambda pair: ours(*pair, residual=pair[1]), data))
            for results, expected in zip(at_once, serial, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_other_python_threads_run_while_a_kernel_does():
    x = torch.randn(32, 64, 112, 112).half()  # long enough that the interpreter would be seen to stand still
    torch.ops.batchnorm.stats(x[:1], None)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.0005):
            ticks.append(None)

    before = torch.ops.batchnorm._instruction_set("")
    torch.ops.batchnorm._instruction_set("baseline")  # the slowest
    watchdog = threading.Thread(target=tick)
    watchdog.start()
    try:
        most = 0
        for _ in range(10):  # a machine with other work may keep the watchdog waiting for a while
            before_call = len(ticks)
            torch.ops.batchnorm.stats(x, None)
            most = max(most, len(ticks) - before_call)
            if most >= 3:
                break
    finally:
        done.set()
        watchdog.join()
        torch.ops.batchnorm._instruction_set(before)
    assert most >= 3


def test_a_fork_after_use():
    # A child of a process that has used OpenMP must not use it again (GNU's runtime hangs, in torch's own operators
    # too), so it sets one thread first, as torch's own data workers do.
    code = """
import multiprocessing, torch, batchnorm as bn
torch.manual_seed(0)
torch.set_num_threads(2)
x = torch.randn(64, 32, 20, 20)
assert bn.ops.native.status().active == "native"
expected = torch.ops.batchnorm.train_forward(x, None, None, None, None, 1e-5, "relu")

def child(queue):
    torch.set_num_threads(1)
    y, *_ = torch.ops.batchnorm.train_forward(x, None, None, None, None, 1e-5, "relu")
    queue.put((y - expected[0]).abs().max().item())

context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
processes = [context.Process(target=child, args=(queue,)) for _ in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join(60)
    assert process.exitcode == 0, process.exitcode
print([queue.get() < 1e-6 for _ in processes])
"""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "[True, True]"


@pytest.mark.skipif(os.environ.get(HUGE) != "1", reason=f"needs 11 GB of memory: {HUGE}=1 runs it")
@pytest.mark.parametrize("shape", [(2**16 + 1, 2**15), (3, 2, 2**29 - 2**27 + 5)], ids=["rows", "planes"])
def test_more_than_2_to_the_31_elements(shape, threads):
    threads(2)
    total, number = math.prod(shape), math.prod(shape) // shape[1]
    assert total > 2**31
    x = torch.empty(shape, dtype=torch.bfloat16)
    flat = x.view(-1)
    # 1 and -1 by turns, and one large value at the very end: the results are known.
    flat[0::2], flat[1::2] = 1, -1
    flat[-1] = 64
    _, mean, m2 = torch.ops.batchnorm.stats(x, None)
    last = shape[1] - 1
    if x.dim() == 2:
        assert mean[:2].tolist() == [1, -1]
        assert m2[:2].tolist() == [0, 0]
        assert mean[last].item() == pytest.approx(-1 + 65 / number, rel=1e-12)
        assert m2[last].item() == pytest.approx(65**2 * (1 - 1 / number), rel=1e-9)
    else:
        assert mean.abs().max() <= 68 / number
        assert m2[last].item() == pytest.approx(number + 64**2 - 1, rel=1e-6)
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    y, sign = torch.ops.batchnorm.normalize(x, zero, one, None, None, x, None, "relu")
    assert y.view(-1)[-5:].tolist() == [max(2 * v, 0) for v in flat[-5:].tolist()]
    assert y.view(-1)[2**31 : 2**31 + 4].tolist() == [2, 0, 2, 0]
    del y
    saved = (x, x, zero, one, None, None, None, sign, None, "relu")
    dx = torch.ops.batchnorm.grad_input(*saved, one.sum() * 0 + number, zero, zero, False)[0]
    assert dx.view(-1)[-5:].tolist() == [max(v, 0) for v in flat[-5:].tolist()]
    sums = torch.ops.batchnorm.grad_sums(*saved)[0]
    assert sums.sum().item() == 64 + total // 2  # total is even, so that the last value replaces a -1
