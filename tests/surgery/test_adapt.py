"""Adapting at test time: what the statistics become, that it can be forgotten, and sorted batches."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.recalibrate import recalibrate
from batchnorm.surgery.sortedness import Sortedness
from oracles.model_zoo import randomize_statistics

KINDS = [nn.BatchNorm1d, bn.nn.BatchNorm1d]


def network(kind=nn.BatchNorm1d, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(3, 4), kind(4, **options), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 5), kind(5, **options)
        )
    return randomize_statistics(model).eval()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def expected(model, x, seen, prior, source):
    """What the model gives for the last batch of ``seen``, in float64, by the definition."""
    batches = [batch.double() for batch in seen]
    n = sum(len(batch) for batch in batches)
    index = 0
    for part in model:
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            mean0, var0 = source[index]
            index += 1
            together = torch.cat(batches)
            weight = prior / (prior + n)
            mean = weight * mean0.double() + (1 - weight) * together.mean(0)
            var = weight * var0.double() + (1 - weight) * together.var(0, correction=0)
            scale = part.weight.double() / (var + part.eps).sqrt()
            batches = [(batch - mean) * scale + part.bias.double() for batch in batches]
        elif isinstance(part, nn.Linear):
            batches = [batch @ part.weight.double().t() + part.bias.double() for batch in batches]
        elif isinstance(part, nn.ReLU):
            batches = [batch.relu() for batch in batches]
    assert len(x) == len(batches[-1])
    return batches[-1]


def source_of(model):
    return [
        (m.running_mean.clone(), m.running_var.clone()) for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [0, 7.5])
def test_episodic_adabn_is_the_formula_of_the_paper(kind, prior):
    model = network(kind)
    source = source_of(model)
    adapted = bn.adapt(model, prior=prior, episodic=True)
    for n in (6, 9, 6):
        x = 2 * torch.randn(n, 3) + 1
        result = adapted(x)
        torch.testing.assert_close(result.double(), expected(model, x, [x], prior, source), atol=1e-5, rtol=1e-5)
    if not prior:  # the same as training normalizes, dropout left out
        with torch.no_grad():
            model.train()[3].eval()
            torch.testing.assert_close(result, model(x))


def test_a_stream_pools_all_that_it_saw_exactly():
    model = network(bn.nn.BatchNorm1d)[:2].eval()  # one layer: what comes to a later one depends on when it came
    source = source_of(model)
    adapted = bn.adapt(model, prior=10)
    seen = [scale * torch.randn(n, 3) + 1e3 for n, scale in ((5, 1), (1, 3), (12, 0.1))]
    for i, batch in enumerate(seen):
        result = adapted(batch)
        together = expected(model.double(), batch, seen[: i + 1], 10, source)
        model.float()
        torch.testing.assert_close(result.double(), together, atol=2e-3, rtol=1e-4)
    adapted.reset()
    torch.testing.assert_close(
        adapted(seen[0]).double(), expected(model, seen[0], seen[:1], 10, source), atol=2e-3, rtol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"method": "tent", "lr": 0.1}, {"episodic": True, "prior": 3}])
def test_reset_gives_everything_back_to_the_bit(options):
    model = network()
    model[4].bias.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model.train()[1].eval()
    modes = [module.training for module in model.modules()]
    required = [parameter.requires_grad for parameter in model.parameters()]
    before = state(model)
    adapted = bn.adapt(model, on_sorted="ignore", **options)
    first = [adapted(torch.full((6, 3), 2.0) + torch.arange(18.0).reshape(6, 3) ** 0.5 + i).clone() for i in range(3)]
    assert not same(state(model), before)
    assert modes == [module.training for module in model.modules()]
    assert required == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(model[1].__dict__) == set(nn.BatchNorm1d(4).__dict__)
    adapted.reset()
    assert same(state(model), before)
    again = [adapted(torch.full((6, 3), 2.0) + torch.arange(18.0).reshape(6, 3) ** 0.5 + i) for i in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))  # the optimizer forgot too
    adapted.reset()
    assert str(bn.changes(model)) == "the model: batch norms are as they were before the adaptation"
    assert bn.changes(adapted) == bn.changes(model)


@pytest.mark.parametrize("kind", KINDS)
def test_tent_is_the_gradient_step_of_the_paper(kind):
    model = network(kind)
    twin = copy.deepcopy(model).double()
    x = torch.randn(8, 3)
    adapted = bn.adapt(model, method="tent", steps=2, optimizer=lambda p: torch.optim.SGD(p, 0.5), on_sorted="ignore")
    result = adapted(x)
    parameters = [p for m in (twin[1], twin[5]) for p in (m.weight, m.bias)]
    twin.train()[3].eval()
    for _ in range(2):
        logits = twin(x.double())
        p = logits.softmax(1)
        entropy = -(p * p.log()).sum(1).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(entropy, parameters), strict=True):
            parameter.data -= 0.5 * gradient
    torch.testing.assert_close(result.double(), logits.detach(), atol=1e-5, rtol=1e-4)
    for ours, theirs in zip([p for m in (model[1], model[5]) for p in (m.weight, m.bias)], parameters, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    assert torch.equal(model[1].running_mean, network(kind)[1].running_mean)
    assert model[1].num_batches_tracked == 100


def test_tent_lowers_the_entropy_and_episodes_are_apart():
    model = network()
    x = torch.randn(64, 3)

    def entropy(logits):
        return float(torch.distributions.Categorical(logits=logits).entropy().mean())

    adapted = bn.adapt(model, method="tent", lr=0.02, on_sorted="ignore")
    course = [entropy(adapted(x)) for _ in range(20)]
    assert course[-1] < course[0] - 0.1
    adapted.reset()
    episodic = bn.adapt(model, method="tent", lr=0.02, episodic=True, on_sorted="ignore")
    assert len({entropy(episodic(x)) for _ in range(3)}) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["adabn", "tent"])
def test_without_gradients_around(context, method):
    first = bn.adapt(network(), method=method, lr=0.1)
    second = bn.adapt(network(), method=method, lr=0.1)
    for i in range(3):
        x = torch.randn(6, 3) + i
        with context():
            result = first(x * 1)
        assert torch.equal(result, second(x))
        assert not result.requires_grad or method == "adabn"
    first.reset()
    assert same(state(first.model), state(network()))


def test_batches_of_the_target_give_its_population():
    model = network(bn.nn.BatchNorm1d)
    source = source_of(model)
    batches = [torch.randn(n, 3) * 3 + 5 for n in (6, 11, 4)]
    before = state(model)
    adapted = bn.adapt(model, batches)
    twin = recalibrate(network(bn.nn.BatchNorm1d), batches)
    assert same(state(model), state(twin))
    x = torch.randn(1, 3)
    assert torch.equal(adapted(x), twin.eval()(x))
    assert same(state(model), state(twin))  # a call adapts no further
    assert "1: normalizes with the statistics of 21 samples of the target, and a prior of 0" in str(bn.changes(adapted))
    adapted.reset()
    assert same(state(model), before)
    bn.adapt(model, (batch for batch in batches), prior=21, num_batches=3)
    target = (twin[1].running_mean, twin[1].running_var)
    for kept, old, new in zip((model[1].running_mean, model[1].running_var), source[0], target, strict=True):
        torch.testing.assert_close(kept, (old + new) / 2)
    assert "can be read once only" in str(bn.changes(model))


def test_tent_with_batches_learns_and_takes_their_statistics():
    model = network()
    before = state(model)
    batches = [torch.randn(16, 3) * 3 + 5 for _ in range(4)]
    adapted = bn.adapt(model, batches, "tent", lr=0.05)
    assert not torch.equal(model[1].weight, before["1.weight"])
    assert torch.equal(model[4].weight, before["4.weight"])
    torch.testing.assert_close(model[1].running_mean, model[0](torch.cat(batches)).mean(0))
    assert adapted(torch.randn(1, 3)).shape == (1, 5)
    adapted.reset()
    assert same(state(model), before)


def test_only_the_layers_that_were_chosen_and_how_the_model_is_called():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, *, x):
            return {"logits": self.inner(x)}

    model = Named().eval()
    before = state(model)
    adapted = bn.adapt(model, method="tent", layers="inner.1", lr=0.1)
    adapted(x=torch.randn(6, 3))
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert moved == {"inner.1.weight", "inner.1.bias"}
    adapted.reset()
    adapted = bn.adapt(model, [{"x": torch.randn(6, 3)}], layers="inner.5")
    moved = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert moved == {"inner.5.running_mean", "inner.5.running_var", "inner.5.num_batches_tracked"}
    adapted.reset()
    adapted = bn.adapt(model, forward_fn=lambda model, batch: model(x=batch["pixels"]))
    assert adapted({"pixels": torch.randn(6, 3)})["logits"].shape == (6, 5)


def test_convolutions_masks_and_layers_used_twice():
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), bn.nn.BatchNorm2d(3)).eval()
    adapted = bn.adapt(conv, episodic=True)
    y = adapted(torch.randn(1, 2, 6, 6) * 4 + 3)  # one image has values enough
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.nn.BatchNorm1d(2)

        def forward(self, x, lengths):
            return self.norm(self.norm(x, lengths=lengths), lengths=lengths)

    model = Padded().eval()
    adapted = bn.adapt(model)
    x, lengths = torch.randn(3, 2, 5), torch.tensor([5, 2, 3])
    adapted(x, lengths)
    real = torch.cat([x[i, :, :n] for i, n in enumerate(lengths)], 1)
    first = (real - real.mean(1, keepdim=True)) / (real.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.norm.running_mean, torch.cat([real, first], 1).mean(1))


def test_a_frozen_and_a_compiled_model_adapt_too():
    model = bn.freeze(network().train())
    plain = network()
    for options in ({"prior": 2}, {"method": "tent", "lr": 0.1}):
        ours, theirs = bn.adapt(model, **options), bn.adapt(plain, **options)
        for _ in range(2):
            x = torch.randn(6, 3)
            assert torch.equal(ours(x), theirs(x))
        ours.reset()
        theirs.reset()
    for method in ("adabn", "tent"):
        batches = [torch.randn(6, 3) + 4 for _ in range(3)]
        ours, theirs = bn.adapt(model, batches, method, lr=0.1), bn.adapt(plain, batches, method, lr=0.1)
        x = torch.randn(6, 3)
        assert torch.equal(ours(x), theirs(x))
        ours.reset()
        theirs.reset()
    assert not model[1].weight.requires_grad
    assert not model[1].track_running_stats
    assert not model.train()[1].training
    bn.unfreeze(model)
    assert same(state(model), state(plain))
    compiled = torch.compile(network(), backend="eager")
    x = torch.randn(6, 3)
    compiled(x)
    assert torch.equal(bn.adapt(compiled)(x), bn.adapt(plain)(x))


@pytest.mark.parametrize("options", [{"prior": 2}, {"method": "tent", "lr": 0.1}])
def test_a_copy_adapts_by_itself(options):
    adapted = bn.adapt(network(), **options)
    adapted(torch.randn(6, 3))
    before = state(adapted.model)
    x = torch.randn(6, 3)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        result = twin(x)
        assert not same(state(twin.model), before)
        assert same(state(adapted.model), before)
        twin.reset()
        assert same(state(twin.model), state(network()))
    assert torch.equal(adapted(x), result)


def test_nan_statistics_of_the_source_do_not_survive():
    model = network()
    model[1].running_mean.fill_(math.nan)
    assert bn.adapt(model)(torch.randn(6, 3)).isfinite().all()


def test_a_batch_with_nan_does_not_stay_in_gamma_and_beta():
    adapted = bn.adapt(network(), method="tent")
    before = state(adapted.model)
    adapted(torch.full((6, 3), math.nan))
    assert same(state(adapted.model), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_with_nan_or_infinity_does_not_stay_in_the_statistics(value):
    adapted, twin = bn.adapt(network()), bn.adapt(network())
    x, y = torch.randn(6, 3) + 1, torch.randn(6, 3)
    spoilt = torch.cat([x, torch.full((1, 3), value)])
    source = adapted.model(x)
    assert torch.equal(adapted(spoilt)[:6], source)  # nothing is known: as the source has it
    assert same(state(adapted.model), state(network()))
    assert torch.equal(adapted(x), twin(x))
    known = state(adapted.model)
    assert adapted(spoilt)[:6].isfinite().all()
    assert same(state(adapted.model), known)
    assert torch.equal(adapted(y), twin(y))


def test_predictions_that_are_nan_say_nothing_of_the_order():
    adapted = bn.adapt(classifier())
    for _ in range(4):
        adapted(torch.full((60, 4), math.nan))
        for batch in stream(60, by_class=False)[:2]:
            adapted(batch)
    assert adapted.sortedness.samples == 480


def classifier():
    """Tells the class, of 4, that is written into its input."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
        model[1].bias.zero_()
    return model


def stream(sizes, by_class):
    labels = torch.cat([torch.arange(4).repeat(64)])
    order = labels.argsort(stable=True) if by_class else torch.randperm(256)
    x = 3 * nn.functional.one_hot(labels[order], 4) + torch.randn(256, 4)
    return list(x.split(sizes))


def test_sorted_batches_are_told_once_in_numbers():
    adapted = bn.adapt(classifier(), episodic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in stream(32, by_class=False):
            adapted(batch)
    assert adapted.sortedness.share < 0.05
    adapted.reset()
    batches = stream(32, by_class=True)
    adapted(batches[0])
    adapted(batches[1])  # the same class: nothing to be told apart
    with pytest.warns(bn.surgery.SortedBatchesWarning, match=r"sorted by class: of 3 with 32 samples, .*: shuffle"):
        adapted(batches[2])
    for batch in batches[3:]:
        adapted(batch)
    assert adapted.sortedness.share > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(batch)  # once
        silent = bn.adapt(classifier(), on_sorted="ignore")
        for batch in stream(32, by_class=True):
            silent(batch)


@pytest.mark.parametrize("method", ["adabn", "tent"])
def test_sorted_batches_are_refused_before_they_do_harm(method):
    model = classifier()
    adapted = bn.adapt(model, method=method, on_sorted="raise")
    batches = stream(32, by_class=True)
    for batch in batches[:2]:
        adapted(batch)
    before = state(model)
    with pytest.raises(bn.SurgeryError, match="batches are sorted by class: of 3 with 32 samples"):
        adapted(batches[2])
    assert same(state(model), before)
    adapted.reset()
    before = state(model)
    with pytest.raises(bn.SurgeryError, match="batches are sorted by class"):
        bn.adapt(model, batches, method, on_sorted="raise")
    assert same(state(model), before)
    with pytest.warns(bn.surgery.SortedBatchesWarning, match="sorted"):
        bn.adapt(model, batches, method)
    assert "batches are sorted by class" in bn.changes(model).lost[0].lost


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 60])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_shuffled_batches_of_any_size_raise_no_alarm(size, classes):
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        found = Sortedness()
        shares = torch.rand(classes, generator=generator) ** 2
        for _ in range(20):
            found.add(torch.multinomial(shares, size, replacement=True, generator=generator), classes)
            assert not found.is_sorted, str(found)


def test_the_share_is_mutual_information_over_entropy():
    found = Sortedness()
    assert found.share == 0
    found.add(torch.tensor([0] * 50), 3)
    assert found.share == 0
    found.add(torch.tensor([0] * 50), 3)
    assert found.share == 0  # nothing but one class: nothing can be said
    found = Sortedness()
    for batch in ([0] * 30 + [1] * 10, [1] * 40):
        found.add(torch.tensor(batch), 3)
    p = np.array([30, 50]) / 80
    q = np.array([30, 10]) / 40
    total, within = (-(v * np.log(v)).sum() for v in (p, q))
    assert found.share == pytest.approx((total - within / 2 - 1 / 160) / total)
    assert found.is_sorted
    assert (found.samples, found.batches) == (80, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "coral"}, "expected method"),
        ({"on_sorted": "stop"}, "expected on_sorted"),
        ({"prior": -1}, 'expected a prior of 0 or more samples, for method="adabn" alone, got -1'),
        ({"prior": math.inf}, "expected a prior of 0 or more"),
        ({"prior": 3, "method": "tent"}, "for method=\"adabn\" alone, got 3 for 'tent'"),
        ({"lr": 0}, "expected lr above 0, got 0"),
        ({"steps": 0}, "expected steps of 1 or more, got 0"),
        ({"num_batches": 3}, "expected num_batches together with batches, got 3 without"),
        ({"batches": [torch.randn(6, 3)], "episodic": True}, "expected episodic=True without batches"),
        ({"batches": iter([torch.randn(6, 3)]), "method": "tent"}, "expected batches that can be read twice"),
        ({"batches": torch.randn(6, 3)}, "expected batches, got one Tensor: give a list of it, or call the result"),
        ({"batches": 3}, "expected batches to iterate over, got int"),
        ({"layers": "7"}, "which none has"),
    ],
)
def test_options_that_make_no_sense(options, message):
    model = network()
    before = state(model)
    with pytest.raises(bn.InputError, match=message):
        bn.adapt(model, **options)
    assert same(state(model), before)


def test_refusals_and_failures_leave_the_model_as_it_was():
    with pytest.raises(bn.SurgeryError, match="expected a batch norm to adapt, got Linear without"):
        bn.adapt(nn.Linear(2, 2))
    with pytest.raises(
        bn.SurgeryError, match=r"0: expected a layer with a running variance, got IterNorm: leave it out"
    ):
        bn.adapt(nn.Sequential(bn.nn.IterNorm(4, 2)))
    with pytest.raises(
        bn.SurgeryError, match="1: expected a batch norm with gamma and beta to learn, got affine=False"
    ):
        bn.adapt(network(affine=False), method="tent")
    model = network()
    before = state(model)
    adapted = bn.adapt(model)
    with pytest.raises(
        bn.InputError, match=r"expected more than 1 value per channel to adapt to, got \[1, 4\]: give a pri"
    ):
        adapted(torch.randn(1, 3))
    with pytest.raises(RuntimeError):
        adapted(torch.randn(4, 7))
    x = torch.randn(6, 3)
    expected = adapted(x)
    adapted.reset()
    handle = model[5].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapted(torch.randn(9, 3) + 4)
    assert same(state(model), before)
    handle.remove()
    assert torch.equal(adapted(x), expected)  # the batch that failed is not in the statistics
    adapted.reset()
    assert not model[1]._forward_pre_hooks
    tent = bn.adapt(model, method="tent", logits=lambda y: y[:, :1], on_sorted="ignore")
    with pytest.raises(
        bn.InputError, match=r"expected logits \(N, K\) of 2 classes or more for an entropy, got \[6, 1\]"
    ):
        tent(torch.randn(6, 3))
    with pytest.raises(RuntimeError):
        bn.adapt(model, [torch.randn(6, 3), torch.randn(6, 9)], on_sorted="ignore")
    with pytest.raises(RuntimeError):
        bn.adapt(model, [torch.randn(6, 3), torch.randn(6, 9)], method="tent", on_sorted="ignore")
    assert same(state(model), before)


@pytest.mark.parametrize("method", ["adabn", "tent"])
@pytest.mark.parametrize("to", ["sync", "frozen", "group"])
def test_a_model_that_was_converted_since_is_not_adapted_in_silence(method, to):
    model = randomize_statistics(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), 1).eval()
    before = copy.deepcopy(model.state_dict())
    adapted, x = bn.adapt(model, method=method), torch.randn(16, 4)
    adapted(x)
    bn.convert(model, to)
    with pytest.raises(bn.SurgeryError, match=r"expected the batch norms that were adapted, .*: convert it before"):
        adapted(x)
    if to == "group":
        with pytest.raises(bn.SurgeryError, match=r"expected the statistics.*: bn.revert\(model\)"):
            adapted.reset()
    bn.revert(model)
    adapted.reset()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_reset_in_layers_of_another_kind():
    adapted = bn.adapt(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval())
    bn.convert(adapted, "group")
    with pytest.raises(bn.SurgeryError, match="expected the statistics"):
        adapted.reset()
