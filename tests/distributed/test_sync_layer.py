"""What a SyncBatchNorm is as a module: groups, copies, files, conversions, eval; and one process alone."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import distributed

import batchnorm as bn
from distributed.pair import on_both_ranks


def trained(layer, *shape):
    """The layer after a batch, so that no value hides an error."""
    layer(torch.randn(shape or (6, 3)) * 2 + 1)
    return layer


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "file": saved_and_loaded,
}


def gathered(value):
    found = [None, None]
    distributed.all_gather_object(found, value)
    return found


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (4, 3, 2, 5), (3, 3, 2, 2, 2), (2, 3, 2, 1, 2, 2)])
def test_alone_it_is_a_batch_norm_of_any_rank(shape):
    layer, one = bn.nn.SyncBatchNorm(3, activation="relu"), bn.nn.BatchNorm1d(3, activation="relu")
    for module in (layer, one):
        module._check_input_dim = lambda _: None
    x = torch.randn(shape)
    assert torch.equal(layer(x), one(x))
    assert torch.equal(layer.eval()(x), one.eval()(x))
    torch.testing.assert_close(layer.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_a_vector_is_refused_in_torchs_words():
    with pytest.raises(ValueError, match=r"expected at least 2D input \(got 1D input\)"):
        bn.nn.SyncBatchNorm(3)(torch.randn(3))


def test_arguments_are_torchs_in_their_order():
    theirs = list(inspect.signature(torch.nn.SyncBatchNorm).parameters)
    ours = list(inspect.signature(bn.nn.SyncBatchNorm).parameters)
    assert ours[: theirs.index("dtype") + 1] == theirs[: theirs.index("dtype") + 1]


def test_programs_that_look_for_batch_norm_find_it():
    assert isinstance(bn.nn.SyncBatchNorm(3), torch.nn.modules.batchnorm._BatchNorm)
    assert (
        repr(bn.nn.SyncBatchNorm(3, activation="relu")) == repr(torch.nn.SyncBatchNorm(3))[:-1] + ", activation='relu')"
    )


def test_state_dicts_go_both_ways():
    layer, other = trained(bn.nn.SyncBatchNorm(3)), torch.nn.SyncBatchNorm(3)
    other.load_state_dict(layer.state_dict(), strict=True)
    back = bn.nn.SyncBatchNorm(3)
    back.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(back.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies(copied):
    layer = trained(bn.nn.SyncBatchNorm(3, activation="silu", ddof=0))
    twin, x = copied(layer), torch.randn(5, 3)
    assert (twin.activation, twin.ddof, twin.process_group) == ("silu", 0, None)
    assert torch.equal(twin(x), layer(x))
    torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)


# --- conversion -------------------------------------------------------------------------------------------------------


def test_conversion_keeps_parameters_activations_and_modes():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3),
        trained(bn.nn.BatchNorm1d(3, activation="silu", ddof=0, momentum=None)),
        torch.nn.Sequential(trained(torch.nn.BatchNorm1d(3)).eval(), torch.nn.BatchNorm1d(3, affine=False)),
        bn.nn.BatchNorm1d(3, bias=False),
    )
    x, tensors = torch.randn(6, 4), [*model.parameters(), *model.buffers()]
    state, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(model)(x)
    converted = bn.nn.SyncBatchNorm.convert_sync_batchnorm(model, "a group")
    assert converted is model
    layers = [module for module in model.modules() if isinstance(module, bn.nn.SyncBatchNorm)]
    assert len(layers) == 4
    assert {layer.process_group for layer in layers} == {"a group"}
    assert [layer.training for layer in layers] == [True, False, True, True]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    torch.testing.assert_close(model(x), expected)


def test_conversion_of_the_root_and_of_torchs_own():
    theirs = trained(torch.nn.SyncBatchNorm(3).eval())
    ours = bn.nn.SyncBatchNorm.convert_sync_batchnorm(theirs)
    assert isinstance(ours, bn.nn.SyncBatchNorm)
    assert ours.weight is theirs.weight
    assert not ours.training


def test_conversion_refuses_what_it_would_change():
    """pytorch #187298: a subclass may do more, and torch's conversion drops it without a word."""

    class WithMore(torch.nn.BatchNorm2d):
        pass

    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Sequential(WithMore(3)))
    with pytest.raises(bn.InputError, match=r"own layers to convert, got WithMore at '1\.0': replace it by hand"):
        bn.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm1d


# --- two ranks --------------------------------------------------------------------------------------------------------


@on_both_ranks
def test_a_process_group_of_one_shares_nothing(rank):
    groups = [distributed.new_group([other]) for other in range(2)]
    layer, one, x = (
        bn.nn.SyncBatchNorm(3, process_group=groups[rank]),
        bn.nn.BatchNorm1d(3),
        torch.randn(6, 3) * (rank + 1),
    )
    torch.testing.assert_close(layer(x), one(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), one.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected a process group that this process belongs to, got one of other"):
        bn.nn.SyncBatchNorm(3, process_group=groups[1 - rank])(x)


@pytest.mark.parametrize("way", COPIES)
@on_both_ranks
def test_copies_keep_the_process_group(rank, way):
    group = distributed.new_group([0, 1])
    layer = trained(bn.nn.SyncBatchNorm(3, process_group=group))
    twin = COPIES[way](layer)
    assert twin.process_group is group
    x = torch.randn(4, 3) + rank
    assert torch.equal(twin(x), layer(x))


@on_both_ranks
def test_a_group_that_is_not_here_is_missed_aloud(rank):
    group = distributed.new_group([0, 1])
    layer = trained(bn.nn.SyncBatchNorm(3, process_group=group))
    stored, name = pickle.dumps(layer), group.group_name
    distributed.destroy_process_group(group)
    orphan = pickle.loads(stored)
    x = torch.randn(4, 3) + rank
    assert orphan.eval()(x).isfinite().all()
    message = rf"expected the process group '{name}' of ranks \[0, 1\] that .* set its process_group"
    with pytest.raises(bn.SynchronizationError, match=message):
        orphan.train()(x)
    assert orphan.num_batches_tracked == 1
    orphan.process_group = None
    orphan(x)


@on_both_ranks
def test_a_group_of_the_same_name_and_other_ranks_is_another(rank):
    group = distributed.new_group([0, 1])
    state = bn.nn.SyncBatchNorm(3, process_group=group).__getstate__()
    assert state["process_group"] == (group.group_name, (0, 1))
    twin = bn.nn.SyncBatchNorm(3)
    twin.__setstate__({**state, "process_group": state["process_group"]._replace(ranks=(0, 1, 2, 3))})
    with pytest.raises(bn.SynchronizationError, match=r"of ranks \[0, 1, 2, 3\]"):
        twin(torch.randn(4, 3) + rank)


@on_both_ranks
def test_only_training_talks(rank):
    """Eval and no running statistics: what one rank does alone must not wait for the other."""
    layers = [trained(bn.nn.SyncBatchNorm(3)), bn.nn.SyncBatchNorm(3, track_running_stats=False)]
    if rank == 0:
        for layer in layers:
            x = torch.randn(6, 3, 2, requires_grad=True)
            y = layer.eval()(x)
            y.sum().backward()
            assert x.grad.isfinite().all()
    distributed.barrier()


@on_both_ranks
def test_without_gradients_it_still_trains(rank):
    layer, one, whole = bn.nn.SyncBatchNorm(3), bn.nn.BatchNorm1d(3), torch.randn(6, 3)
    with torch.no_grad():
        layer(whole[2 * rank : 2 + 4 * rank])
        one(whole)
    torch.testing.assert_close(layer.state_dict(), one.state_dict())


@on_both_ranks
def test_two_forwards_before_one_backward(rank):
    layer, one = bn.nn.SyncBatchNorm(3), bn.nn.BatchNorm1d(3)
    first, second = torch.randn(6, 3), torch.randn(6, 3) + 1
    mine = slice(2 * rank, 2 + 4 * rank)
    x, reference = first[mine].clone().requires_grad_(), first.clone().requires_grad_()
    (layer(x).pow(3).sum() + layer(second[mine]).sum()).backward()
    (one(reference).pow(3).sum() + one(second).sum()).backward()
    torch.testing.assert_close(x.grad, reference.grad[mine])


@on_both_ranks
def test_autocast(rank):
    layer = bn.nn.SyncBatchNorm(3)
    linear = torch.nn.Linear(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(linear(torch.randn(5 + rank, 4)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


@on_both_ranks
def test_exports_for_eval(rank):
    layer = trained(bn.nn.SyncBatchNorm(3, activation="relu"), 6, 3, 4).eval()
    x = torch.randn(5, 3, 4)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    assert not [node for node in program.graph.nodes if "c10d" in str(node.target)]
    assert gathered(rank) == [0, 1]


@on_both_ranks
def test_the_functional_form(rank):
    whole, running = torch.randn(7, 3), [torch.zeros(3), torch.ones(3)]
    expected, expected_running = torch.zeros(7, 3), [torch.zeros(3), torch.ones(3)]
    mine = slice(2) if rank == 0 else slice(2, 7)
    y = bn.nn.functional.batch_norm(whole[mine], *running, training=True, group=distributed.group.WORLD)
    expected = bn.nn.functional.batch_norm(whole, *expected_running, training=True)
    torch.testing.assert_close(y, expected[mine])
    torch.testing.assert_close(running, expected_running)
    # In eval a group is nobody's business.
    if rank == 0:
        bn.nn.functional.batch_norm(whole, *running, group=distributed.group.WORLD)


@on_both_ranks
def test_the_operator_passes_opcheck(rank):
    x, mean, weight = torch.randn(4, 3, 2), torch.randn(3).double(), torch.rand(3)
    for tensor in (x, weight):
        tensor.requires_grad_()
    arguments = (x, mean, mean.square() + 1, weight, None, None, None, "relu", torch.tensor(8.0).double(), 1e-5)
    group = distributed.group.WORLD
    torch.library.opcheck(torch.ops.batchnorm.shared_normalize, (*arguments, group.group_name, 2, rank))


@on_both_ranks
def test_recomputation_in_checkpoints(rank):
    """Both kinds of torch's checkpointing recompute the forward, collective included, on both ranks."""
    whole = torch.randn(6, 3)
    mine = slice(2 * rank, 2 + 4 * rank)
    one = bn.nn.BatchNorm1d(3)
    reference = whole.clone().requires_grad_()
    one(reference).pow(3).sum().backward()
    for reentrant in (False, True):
        layer, x = bn.nn.SyncBatchNorm(3), whole[mine].clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum().backward()
        torch.testing.assert_close(x.grad, reference.grad[mine])
        torch.testing.assert_close(layer.state_dict(), one.state_dict())  # one batch, counted once


@on_both_ranks
def test_shapes_on_the_meta_device(rank):
    layer = bn.nn.SyncBatchNorm(3, device="meta")
    x = torch.empty(4 + rank, 3, 5, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
