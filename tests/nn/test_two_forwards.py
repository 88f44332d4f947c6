"""Two forwards before one backward: buffers that moved in place must not break the first one's gradient.

pytorch #175024, #110363, #65907: under DistributedDataParallel every forward writes into the buffers.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import batchnorm as bn

MODES = {
    "train, train": (True, True),
    "eval, train": (False, True),
    "train, eval": (True, False),
    "eval, eval": (False, False),
}
modes = pytest.mark.parametrize("modes", MODES.values(), ids=MODES.keys())


def overwrite(layer):
    """What DDP's broadcast of the buffers does before a forward, whatever the rank."""
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.copy_(buffer + 1)


def inputs():
    x = torch.linspace(-1, 3, 4 * 3 * 5).reshape(4, 3, 5).cos()
    return x.clone().requires_grad_(), (x * 2 - 1).requires_grad_()


def together(layer, modes, between=lambda _: None):
    x, z = inputs()
    first = layer.train(modes[0])(x)
    between(layer)
    second = layer.train(modes[1])(z)
    (first.pow(3).sum() + second.pow(3).sum()).backward()
    return x.grad, z.grad, [parameter.grad for parameter in layer.parameters()]


def separately(layer, modes, between=lambda _: None):
    """Each forward with its own backward, which nothing disturbs."""
    x, z = inputs()
    layer.train(modes[0])(x).pow(3).sum().backward()
    between(layer)
    layer.train(modes[1])(z).pow(3).sum().backward()
    return x.grad, z.grad, [parameter.grad for parameter in layer.parameters()]


@modes
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_backward_is_two_backwards(modes, compiled):
    layer = bn.nn.BatchNorm1d(3, activation="silu")
    overwrite(layer)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    if compiled:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(together(layer, modes, overwrite), separately(twin, modes, overwrite))
    torch._dynamo.reset()


@modes
def test_with_weighted_inference_and_gamma_of_each_sample(modes):
    layer = bn.nn.BatchNorm1d(3, inference_weight=0.3, affine=False)
    overwrite(layer)
    gamma = torch.rand(4, 3)

    class Conditional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, x):
            return self.layer(x, weight=gamma)

    one, other = Conditional(), Conditional()
    torch.testing.assert_close(together(one, modes, overwrite), separately(other, modes, overwrite))


def test_torchs_layer_fails_in_eval():
    """The defect itself: this set-up would show it in ours."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        together(torch.nn.BatchNorm1d(3), (False, True), overwrite)


def under_data_parallel(rank: int, store: str) -> None:
    """One of two processes, with equal data. Rank 0's buffers change; DDP writes them into rank 1's before a forward.

    Newer torch hides that write from autograd: what used to be an error is a wrong gradient of torch's own layer.
    """
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        for modes in MODES.values():
            layer = bn.nn.BatchNorm1d(3)
            twin = copy.deepcopy(layer)
            wrapped = DistributedDataParallel(layer, broadcast_buffers=True)
            ours = together(wrapped, modes, lambda wrapped: overwrite(wrapped) if rank == 0 else None)
            torch.testing.assert_close(ours, separately(twin, modes, overwrite))
            torch.testing.assert_close(layer.state_dict(), twin.state_dict())
    finally:
        dist.destroy_process_group()


def test_under_data_parallel(tmp_path):
    torch.multiprocessing.spawn(under_data_parallel, (str(tmp_path / "store"),), nprocs=2)
