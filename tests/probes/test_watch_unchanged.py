"""Watching changes nothing: outputs, gradients, statistics, random numbers, the model itself."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import distributed, nn

import batchnorm as bn
from probes.watched import Checkpointed, Twice, convnet, inputs, mlp, same_with_and_without, train


@pytest.mark.parametrize(
    "model",
    [
        mlp,
        lambda: mlp(bn.nn.BatchNorm1d, lambda: nn.ReLU(inplace=True)),
        lambda: mlp(lambda n: bn.nn.GhostBatchNorm1d(n, virtual_batch_size=5)),
        lambda: mlp(bn.nn.BatchRenorm1d),
        convnet,
        lambda: convnet().to(memory_format=torch.channels_last),
        lambda: Checkpointed(reentrant=False),
        lambda: Checkpointed(reentrant=True),
        Twice,
    ],
    ids=["torch", "ours in place", "ghost", "renorm", "conv", "channels last", "checkpoint", "reentrant", "twice"],
)
def test_training_is_the_same_bit_for_bit(model):
    model = model()
    watch = same_with_and_without(model, inputs(model))
    assert {record["step"] for record in watch.records} == {0, 2}
    assert {record["layer"] for record in watch.records} == set(watch.layers)


def test_every_module_of_a_network_can_be_watched():
    model = convnet()
    watch = same_with_and_without(model, inputs(model), layers=nn.Module, modes=("train", "eval"))
    assert watch.layers == ("", *map(str, range(8)))
    assert not watch.unseen


def test_bfloat16_autocast():
    model = mlp(act=nn.ReLU)
    watch = same_with_and_without(model, inputs(model), autocast=True, layers=nn.Module)
    assert watch.latest("1")["grad_std"] is not None


def test_a_recomputation_is_not_seen_again():
    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        with bn.watch(model, every=1) as watch:
            train(model, inputs(model), steps=4)
        assert [record["layer"] for record in watch.records] == ["first.1", "first.4", "second"] * 4
        # In the reentrant kind the first pass has no graph.
        assert (watch.latest("first.1")["grad_mean"] is None) == reentrant
        assert watch.latest("second")["grad_mean"] is not None


def test_a_checkpointed_root_counts_once():
    model = mlp()
    with bn.watch(model, every=1) as watch:
        x = inputs(model).requires_grad_()
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert (watch.step, len(watch.records)) == (1, 2)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [[len(getattr(module, kind)) for kind in kinds] for module in model.modules()]


def test_nothing_stays_on_the_model():
    model, x = mlp(), torch.randn(4, 6)
    before = hooks(model)

    def interrupted():
        with bn.watch(model, every=1):
            model(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert hooks(model) == before
    watch = bn.watch(model, every=1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(4, 7))
    assert sum(map(sum, hooks(model))) == 1  # only that on the model itself
    model(x)
    watch.remove()
    watch.remove()
    assert hooks(model) == before
    model(x)
    assert len(watch.records) == 2


def test_a_watched_model_is_copied_and_saved_without_its_watch():
    model, x = mlp(), torch.randn(4, 6)
    with bn.watch(model, every=1) as watch:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for each in copies:
            assert torch.equal(each.train()(x), copies[0].train()(x))
        assert watch.records == []
    expected = model.eval()(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_parametrizations_are_not_asked():
    model = nn.Sequential(nn.BatchNorm1d(4))

    class Counting(nn.Module):
        asked = 0

        def forward(self, weight):
            Counting.asked += 1
            return weight

    nn.utils.parametrize.register_parametrization(model[0], "weight", Counting())
    x = torch.randn(8, 4)
    Counting.asked = 0
    model(x)
    once = Counting.asked
    with bn.watch(model, every=1) as watch:
        model(x)
    assert Counting.asked == 2 * once
    assert watch.latest("0")["weight"] is None
    assert watch.latest("0")["bias"] == [0.0] * 4


def test_compiled_models_run_their_looks_in_eager():
    model = mlp(bn.nn.BatchNorm1d)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    calls = []

    def backend(graph, _):
        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(8, 6)
    with bn.watch(compiled, every=3, layers="1") as watch:
        for step in range(7):
            torch.testing.assert_close(compiled(x), twin(x))
            assert len(calls) == step - step // 3  # steps 0, 3 and 6 don't run the graph
    assert [record["step"] for record in watch.records] == [0, 3, 6]
    assert torch.compiler.is_compiling() is False
    compiled(x)
    assert len(calls) == 5
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_eager_is_only_asked_for_where_something_is_compiled(compiled, monkeypatch):
    frames = importlib.import_module("torch._dynamo.eval_frame")
    monkeypatch.setattr(frames, "cached_backends", {1: None, **({2: "inductor"} if compiled else {})})
    asked, stance = [], torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda wanted: asked.append(wanted) or stance(wanted))
    model = mlp()
    with bn.watch(model, every=1) as watch:
        model(inputs(model))
    assert watch.records
    assert asked == (["force_eager"] if compiled else [])


def test_a_watch_on_the_model_inside_a_compiled_one_sees_nothing_and_breaks_nothing():
    model = mlp()
    torch._dynamo.reset()
    with bn.watch(model, every=1) as watch:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.randn(8, 6))
    assert watch.records == []
    torch._dynamo.reset()


def test_a_compiled_part_is_seen():
    model = mlp()
    model[4] = torch.compile(model[4], backend="eager")
    with bn.watch(model, every=1) as watch:
        train(model, inputs(model), steps=2)
    assert watch.layers == ("1", "4")
    assert [record["layer"] for record in watch.records] == ["1", "4"] * 2
    torch._dynamo.reset()


def test_a_model_compiled_in_place_is_refused():
    model = mlp()
    model.compile(backend="eager")
    with pytest.raises(bn.InputError, match=r"compiled in place by model.compile\(\): watch what torch.compile"):
        bn.watch(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    scripted = torch.jit.script(mlp())
    with pytest.raises(bn.InputError, match="expected a model that runs in Python, got a scripted one"):
        bn.watch(scripted, layers="1")
    model = nn.Sequential(nn.BatchNorm1d(6), scripted)
    with bn.watch(model, every=1) as watch:
        train(model, torch.randn(8, 6))
    assert watch.layers == ("0",)


def test_exported_and_transformed_passes_are_left_alone():
    model, x = mlp().eval(), torch.randn(8, 6)
    with bn.watch(model, every=1, modes=("eval",)) as watch:
        expected = model(x).detach()
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected)
        jacobian = torch.func.vmap(torch.func.jacrev(model))(x[:, None])
        assert jacobian.shape == (8, 1, 3, 1, 6)
    assert {record["step"] for record in watch.records} == {0}


def test_data_parallel_without_devices():
    model = nn.DataParallel(mlp())
    watch = same_with_and_without(model, torch.randn(9, 6))
    assert watch.layers == ("1", "4")


def test_data_parallel_wrappers(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        with bn.watch(model, every=1) as watch:
            train(model, inputs(model), steps=2)
        assert watch.layers == ("1", "4")
        assert watch.latest("4")["grad_norm"] is not None
    finally:
        distributed.destroy_process_group()
