"""Memory of large outputs, kept for the next ones: that it is used again, bounded, and never seen twice."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from batchnorm import InputError
from batchnorm.nn import BatchNorm2d
from batchnorm.ops import native
from ops.steps import assert_same, exact, ours

MB = 1 << 20

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept on Linux"),
]


@pytest.fixture(autouse=True)
def _nothing_kept():
    native.release_memory()
    assert native.kept_memory() == 0
    yield
    native.release_memory()


def output(*shape: int) -> torch.Tensor:
    mean, invstd = torch.zeros(shape[1]), torch.ones(shape[1])
    return torch.ops.batchnorm.normalize(torch.randn(shape), mean, invstd, None, None, None, None, "none")[0]


@pytest.mark.parametrize("shape", [(64, 16, 40), (8, 16, 128, 128)], ids=["160 KB", "8 MB"])
def test_the_memory_of_a_freed_output_serves_the_next(shape):
    y = output(*shape)
    address, size = y.data_ptr(), y.numel() * 4
    view = y[1:, :, ::2]
    assert native.kept_memory() == 0
    del y
    assert native.kept_memory() == 0, "a view still needs it"
    del view
    assert size <= native.kept_memory() <= size + 2 * MB
    again = output(*shape)
    assert again.data_ptr() == address
    assert native.kept_memory() == 0


def test_small_outputs_and_other_sizes_stay_out_of_it():
    small = output(16, 16)
    del small
    assert native.kept_memory() == 0
    large = output(8, 16, 128, 128)
    address = large.data_ptr()
    del large
    assert output(2, 16, 128, 128).data_ptr() != address, "a block four times as large is left for what needs it"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
def test_what_stood_in_it_is_never_seen(memory_format):
    x = (torch.randn(16, 24, 60, 50) + 3).contiguous(memory_format=memory_format)
    grad, residual, mask = torch.randn_like(x), torch.randn_like(x), torch.rand(16, 60, 50) > 0.3
    expected = exact(x, grad, residual=residual, mask=mask)
    for _ in range(3):
        results = ours(x, grad, residual=residual, mask=mask)
        assert_same(results, expected, rtol=1e-4, atol=1e-4)
        for result in results:
            if result.is_floating_point():
                result.fill_(float("nan"))
        del results, result
    assert native.kept_memory() > 3 * x.numel() * 4 - MB


def test_training_does_not_gather_more_and_more():
    layer, x = BatchNorm2d(16, activation="relu"), torch.randn(8, 16, 128, 128, requires_grad=True)
    seen = set()
    for _ in range(6):
        layer(x).sum().backward()
        x.grad = None
        seen.add(native.kept_memory())
    assert len(seen) == 1
    assert max(seen) <= 4 * 8 * MB


def test_several_threads_share_it():
    def work(number: int) -> bool:
        fine = True
        for turn in range(30):
            shape = (1 + (number + turn) % 5, 8, 64, 64)
            y = output(*shape)
            y.fill_(number)
            other = output(*shape)
            other.fill_(-1)
            fine &= bool((y == number).all())
        return fine

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_a_kept_tensor_is_as_good_as_another():
    y = output(8, 16, 128, 128)
    copy = y.clone()
    assert torch.equal(pickle.loads(pickle.dumps(y)), copy)
    assert torch.equal(torch.from_numpy(y.numpy()), copy)
    assert y.untyped_storage().nbytes() == y.numel() * 4
    y.share_memory_()
    assert y.is_shared()
    assert torch.equal(y, copy)
    y.resize_(4, 16)
    assert torch.equal(y, copy.flatten()[:64].view(4, 16))


def run(program: str, **environment: str) -> str:
    path = os.pathsep.join(filter(None, ["tests", os.environ.get("PYTHONPATH", "")]))
    prelude = "import torch\nfrom batchnorm.ops import native\nfrom ops.test_memory import output, MB\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_oldest_go_first_when_there_is_too_much():
    program = """
blocks = [output(n, 16, 128, 128) for n in (4, 6, 8)]
for n in range(3):
    blocks[n] = None
    print(native.kept_memory() // MB)
print(native.kept_memory() <= 15 * MB)
native.release_memory(keep_at_most=5 * MB)
print(native.kept_memory())
output(6, 16, 128, 128)
print(native.kept_memory())
output(4, 16, 128, 128)
print(native.kept_memory() // MB)
"""
    lines = run(program, BATCHNORM_KEEP_MEMORY=str(15 * MB)).split()
    assert lines == ["4", "10", "14", "True", "0", "0", "4"]


def test_it_can_be_switched_off():
    program = "y = output(8, 16, 128, 128)\ndel y\nprint(native.kept_memory())"
    assert run(program, BATCHNORM_KEEP_MEMORY="0") == "0\n"


def test_what_nobody_wants_is_offered_to_the_system():
    program = """
import time
def offered():
    with open("/proc/self/smaps") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree")) // 1024
y = output(8, 16, 128, 128)
del y
print(offered())
time.sleep(2.1)
y = output(2, 16, 128, 128)
del y
print(offered())
y = output(8, 16, 128, 128)
x = torch.randn(8, 16, 128, 128)
y.copy_(x)
print(torch.equal(x, y))
"""
    assert run(program).split() == ["0", "8", "True"]


def test_a_child_of_fork_may_use_it():
    program = """
import os
torch.set_num_threads(1)
y = output(8, 16, 128, 128)
del y
child = os.fork()
if child == 0:
    y = output(8, 16, 128, 128)
    y.fill_(1)
    os._exit(0 if native.kept_memory() == 0 and bool((y == 1).all()) else 1)
print(os.waitpid(child, 0)[1], native.kept_memory() // MB)
"""
    assert run(program).split() == ["0", "8"]


def test_a_negative_limit_is_refused():
    with pytest.raises(InputError, match="keep_at_most as a number of bytes, got -1"):
        native.release_memory(keep_at_most=-1)
