"""SyncBatchNorm on two ranks computes what one process with the whole batch does."""

from __future__ import annotations

import pytest
import torch
from torch import distributed

import batchnorm as bn
from distributed.pair import on_both_ranks
from oracles import batch_norm as oracle

SPLITS = {"equal": 3, "unequal": 1, "empty": 0, "the other empty": 6}
SHAPES = {"2-D": (6, 3), "3-D": (6, 3, 5), "4-D": (6, 3, 2, 5), "5-D": (6, 3, 2, 2, 3)}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def part(whole, rank, split):
    return whole[:split] if rank == 0 else whole[split:]


def leaf(tensor):
    return tensor.clone(memory_format=torch.preserve_format).requires_grad_()


def sync_layer(**options):
    """A layer with values that hide no error."""
    layer = bn.nn.SyncBatchNorm(3, **options)
    with torch.no_grad():
        for name, tensor in layer.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5))
    return layer


def numpy(tensor):
    return None if tensor is None else tensor.detach().double().numpy()


def against_oracle(rank, layer, whole, dy, split, *, mask=None, residual=None, rtol=1e-5, atol=1e-6):
    """Forward and backward of this rank's part against NumPy on the whole batch."""
    affine = [numpy(layer.weight), numpy(layer.bias)]
    before = numpy(layer.running_mean).copy(), numpy(layer.running_var).copy()
    options = {
        "eps": layer.eps,
        "mask": None if mask is None else mask.numpy(),
        "residual": numpy(residual),
        "activation": layer.activation or "none",
    }
    expected, mean, var = oracle.forward(numpy(whole), *affine, **options)
    dx, dgamma, dbeta, dresidual = oracle.backward(numpy(dy), numpy(whole), *affine, **options)
    x = leaf(part(whole, rank, split))
    added = None if residual is None else leaf(part(residual, rank, split))
    y = layer(x, mask=None if mask is None else part(mask, rank, split), residual=added)
    y.backward(part(dy, rank, split))

    def same(got, wanted):
        torch.testing.assert_close(got.double(), torch.as_tensor(wanted), rtol=rtol, atol=atol)

    same(y.detach(), part(expected, rank, split))
    same(x.grad, part(dx, rank, split))
    if added is not None:
        same(added.grad, part(dresidual, rank, split))
    # Local sums, as torch's: all ranks' together are the whole batch's.
    for parameter, wanted in ((layer.weight, dgamma), (layer.bias, dbeta)):
        total = parameter.grad.clone()
        distributed.all_reduce(total)
        same(total, wanted)
    count = len(oracle.positions(numpy(whole), options["mask"]))
    unbiased = var * count / (count - layer.ddof)
    same(layer.running_mean, 0.9 * before[0] + 0.1 * mean)
    same(layer.running_var, 0.9 * before[1] + 0.1 * unbiased)
    assert layer.num_batches_tracked == 1
    return y, x.grad


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@on_both_ranks
def test_equals_one_process(rank, shape, split):
    whole, dy = torch.randn(shape) * 2 + 1, torch.randn(shape)
    against_oracle(rank, sync_layer(), whole, dy, split)


@pytest.mark.parametrize("rank_of_input", [4, 5])
@on_both_ranks
def test_channels_last(rank, rank_of_input):
    shape, memory_format = list(SHAPES.values())[rank_of_input - 2], LAST[rank_of_input]
    whole, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
    y, dx = against_oracle(rank, sync_layer(activation="relu"), whole, dy, 2)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "hardswish"])
@pytest.mark.parametrize("ddof", [0, 1])
@on_both_ranks
def test_masks_residuals_and_activations(rank, activation, ddof):
    whole, dy, residual = (torch.randn(5, 3, 4) for _ in range(3))
    mask = torch.rand(5, 4) > 0.3
    mask[0] = False
    whole.movedim(1, -1)[~mask] = float("nan")  # padding may be anything
    against_oracle(
        rank,
        sync_layer(activation=activation, ddof=ddof),
        whole,
        dy,
        1,
        mask=mask,
        residual=residual,
        rtol=1e-4,
        atol=1e-5,
    )


@on_both_ranks
def test_a_rank_that_is_all_padding(rank):
    whole, dy = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:2] = False
    against_oracle(rank, sync_layer(), whole, dy, 2, mask=mask)


@on_both_ranks
def test_large_mean(rank):
    whole = torch.randn(40, 3, 6, dtype=torch.float64) + torch.tensor([1e4, -1e4, 1.0], dtype=torch.float64)[:, None]
    against_oracle(rank, sync_layer(), whole.float(), torch.randn(40, 3, 6), 11)


@on_both_ranks
def test_ranks_with_different_means(rank):
    """The spread between the ranks' means is most of the variance: averaging variances would lose it."""
    whole = torch.cat([torch.randn(3, 3, 4) * 1e-2 - 1e4, torch.randn(5, 3, 4) * 1e-2 + 1e4])
    against_oracle(rank, sync_layer(), whole, torch.randn(8, 3, 4), 3, atol=1e-5)


@on_both_ranks
def test_constant_channels(rank):
    whole = torch.full((6, 3), 7.0)
    y = sync_layer()
    against_oracle(rank, y, whole, torch.randn(6, 3), 2, rtol=1e-4, atol=1e-4)


@on_both_ranks
def test_nan_stays_in_its_channel(rank):
    whole = torch.randn(6, 3)
    whole[0, 1] = float("nan")  # of rank 0 only
    layer = sync_layer()
    y = layer(part(whole, rank, 3))
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    assert layer.running_mean.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_both_ranks
def test_half_precision(rank, dtype):
    layer, whole, dy = sync_layer().to(dtype), torch.randn(8, 3, 5).to(dtype), torch.randn(8, 3, 5).to(dtype)
    bound = 4 * torch.finfo(dtype).eps
    y, dx = against_oracle(rank, layer, whole, dy, 3, rtol=bound, atol=bound)
    assert y.dtype == dx.dtype == layer.weight.grad.dtype == dtype


@on_both_ranks
def test_all_ranks_empty(rank):
    layer = sync_layer(activation=("relu", None)[rank])  # what happens after the statistics is each rank's own
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(0, 3, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert layer.weight.grad.abs().sum() == 0
    for name in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], before[name])


@on_both_ranks
def test_an_empty_rank_without_gradients_of_its_own_input(rank):
    """The other rank needs the sums of this one whether or not this one needs any."""
    whole = torch.randn(4, 3, dtype=torch.float64)
    layer, one = sync_layer(dtype=torch.float64), bn.nn.BatchNorm1d(3, dtype=torch.float64)
    one.load_state_dict(layer.state_dict())
    x, reference = part(whole, rank, 0).clone().requires_grad_(rank == 1), leaf(whole)
    layer(x).pow(3).sum().backward()
    one(reference).pow(3).sum().backward()
    if rank == 1:
        torch.testing.assert_close(x.grad, reference.grad)


@on_both_ranks
def test_ranks_hold_the_same_bits(rank):
    layer = sync_layer()
    for _ in range(5):
        layer(torch.randn(4 + 3 * rank, 3, 5) * 10 + rank)
    mine = torch.cat([layer.running_mean, layer.running_var]).clone()
    theirs = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(theirs, mine)
    assert torch.equal(theirs[0], theirs[1])


@on_both_ranks
def test_cumulative_and_decayed_averages(rank):
    whole = torch.randn(6, 4, 3)
    for options in ({"momentum": None}, {"decay": 0.7}, {"ddof": 0}):
        layer, one = bn.nn.SyncBatchNorm(3, **options), bn.nn.BatchNorm1d(3, **options)
        for batch in whole:
            layer(part(batch, rank, 1))
            one(batch)
        torch.testing.assert_close(layer.state_dict(), one.state_dict())


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
@on_both_ranks
def test_a_single_value_on_all_ranks_together(rank, shape):
    layer = sync_layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    whole = torch.randn(shape)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got one on all ranks"):
        layer(part(whole, rank, 1))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer(torch.randn(shape)).isfinite().all()  # one on each is two


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("policy", ["running", "skip"])
@on_both_ranks
def test_policies_for_a_single_value(rank, policy, masked):
    """As one process with that value: first and second derivatives, nothing counted; and otherwise as always."""
    options = {"on_single_value": policy, "activation": "silu", "dtype": torch.float64}
    layer = sync_layer(**options)
    one = bn.nn.BatchNorm1d(3, **options)
    one.load_state_dict(layer.state_dict())
    whole = torch.randn(1, 3, 1) if not masked else torch.randn(4, 3, 2)
    mask = None
    if masked:
        mask = torch.zeros(4, 2, dtype=torch.bool)
        mask[3, 1] = True  # of rank 1

    def run(module, x, own_mask, direction):
        x = x.double().requires_grad_()
        y = module(x, mask=own_mask)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), x)
        x.grad = None
        module(x, mask=own_mask).pow(3).sum().backward()
        torch.testing.assert_close(x.grad, first)
        return y, first, second

    direction = torch.randn_like(whole).double()
    split = 0 if not masked else 2
    found = run(
        layer, part(whole, rank, split), None if mask is None else part(mask, rank, split), part(direction, rank, split)
    )
    for got, expected in zip(found, run(one, whole, mask, direction), strict=True):
        torch.testing.assert_close(got, part(expected, rank, split))
    torch.testing.assert_close(layer.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert layer.num_batches_tracked == 0
    more = torch.randn(5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(part(more, rank, 2)), part(one(more), rank, 2))
    torch.testing.assert_close(layer.state_dict(), one.state_dict())


@on_both_ranks
def test_gamma_and_beta_of_each_sample(rank):
    layer, one = (
        sync_layer(activation="relu", dtype=torch.float64),
        bn.nn.BatchNorm1d(3, activation="relu", dtype=torch.float64),
    )
    one.load_state_dict(layer.state_dict())
    whole, gamma, beta = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3, 4), (6, 3), (6, 3)))
    dy = torch.randn_like(whole)
    tensors = [leaf(part(tensor, rank, 2)) for tensor in (whole, gamma, beta)]
    reference = [leaf(tensor) for tensor in (whole, gamma, beta)]
    y, expected = (
        layer(tensors[0], weight=tensors[1], bias=tensors[2]),
        one(reference[0], weight=reference[1], bias=reference[2]),
    )
    torch.testing.assert_close(y, part(expected, rank, 2))
    y.backward(part(dy, rank, 2))
    expected.backward(dy)
    for tensor, whole_tensor in zip(tensors, reference, strict=True):
        torch.testing.assert_close(tensor.grad, part(whole_tensor.grad, rank, 2))
    torch.testing.assert_close(layer.state_dict(), one.state_dict())


@on_both_ranks
def test_nested_inputs(rank):
    """Jagged batches: as one process with the rows of both ranks."""
    rows = [torch.randn(length, 3, dtype=torch.float64) + length for length in (3, 1, 4, 2, 5)]
    layer, one = sync_layer(activation="relu", dtype=torch.float64), bn.nn.BatchNorm1d(3, activation="relu").double()
    one.load_state_dict(layer.state_dict())

    def run(module, rows):
        x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        y = module(x)
        y.values().pow(3).sum().backward()
        return y.values(), x.grad.values()

    found, expected = run(layer, part(rows, rank, 2)), run(one, rows)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, part(wanted, rank, 4))
    torch.testing.assert_close(layer.state_dict(), one.state_dict())
