"""What is refused, and in which words: one line that says what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from study.comparison import tiny
from study.comparison.tiny import arrays, compare, loaders

FEATURES, LABELS = arrays()


def refused(match, model=tiny.make, data=None, error=bn.InputError, **options):
    with pytest.raises(error, match=match) as caught:
        compare(model, data, **options)
    assert "\n" not in str(caught.value)


def narrow(norm):
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.ReLU(), nn.Linear(8, 2))


def test_an_output_that_does_not_fit_the_target():
    refused(r"expected the model to give \(16, 3\), a logit for each of the 3 classes.* got \(16, 2\)", narrow)
    refused(r"expected the model to give \[16\] for a batch of targets \[16\]", data=(FEATURES, FEATURES[:, 0]))


def test_a_model_that_does_not_run():
    refused(
        r"make with none does not run on a batch of \[16, 5\]: RuntimeError: mat1",
        data=(FEATURES[:, 1:], LABELS),
    )


def test_what_is_no_factory():
    refused("expected a model or a function that makes one, got int", 3)
    refused("takes_two to take the normalization alone.* got a function of norm, width: bind", takes_two)
    refused("expected gives_none to give a torch.nn.Module, got NoneType", gives_none)
    refused("raises fails: ZeroDivisionError: by design", raises)
    refused("expected forgetful to call its argument norm with numbers of features, it never did", forgetful)


def takes_two(norm, width):  # noqa: ARG001
    return None


def gives_none():
    return None


def raises():
    raise ZeroDivisionError("by design")


def forgetful(norm):  # noqa: ARG001
    return tiny.plain()


def test_a_model_without_a_place_for_a_normalization():
    refused("expected a linear layer or convolution before", lambda: nn.Linear(6, 3), error=bn.SurgeryError)


def test_inputs_that_are_not_finite():
    broken = FEATURES.copy()
    broken[:, 0] = np.nan
    refused("expected finite inputs, got NaN or inf in 16 of the 16 samples", data=(broken, LABELS))
    refused("expected finite targets in y, got 1 NaN", data=(FEATURES, np.where(np.arange(200) == 7, np.nan, 1.5)))


def test_a_first_loss_that_is_none():
    def overflowing(norm):
        model = tiny.make(norm)
        nn.init.constant_(model[3].weight, 1e38)
        nn.init.constant_(model[3].bias, float("inf"))
        return model

    refused("expected a finite loss before the first step, got nan of overflowing with none on finite", overflowing)


def test_too_small_a_budget_says_what_would_do():
    class Slow(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.net = tiny.make(norm)

        def forward(self, x):
            torch.randn(400, 400) @ torch.randn(400, 400)
            return self.net(x)

    refused(
        r"a budget of 0.02 s is too small for 24 steps of a run: with 2 var.* 3 seeds here it takes \d+ ",
        Slow,
        steps=None,
        budget=0.02,
        lrs="auto",
        seeds=3,
    )


@pytest.mark.parametrize("budget", ["soon", "-3s", 0, "", "5x"])
def test_what_is_no_budget(budget):
    refused("expected a budget such as 45s, 10m or 1h30m", steps=None, budget=budget)


def test_too_small_a_test_part():
    refused("the arrays: expected 20 test samples or more, got 12", data=(FEATURES[:60], LABELS[:60]))
    train, validation, _ = loaders()
    few = torch.utils.data.DataLoader(torch.utils.data.Subset(validation.dataset, range(5)), batch_size=5)
    refused("expected 20 test samples or more, got 5", data=[train, validation, few])


def test_loaders_that_cannot_be_compared_with():
    train, validation, test = loaders()
    refused("of two batches or more.* 1 of 120", data=[loaders(120)[0], validation, test])
    refused("expected at least one batch of test data, got none: give a third loader", data=[train, loaders(40)[1]])
    refused("expected two or three loaders", data=[train])
    refused("expected a train loader that can be gone through again", data=[iter(train), validation, test])
    refused("expected batches as .inputs, target., got a Tensor", data=[[torch.randn(4, 6)] * 3] * 3)
    refused("expected a batch with one of labels", data=[[{"x": torch.randn(4, 6)}] * 3] * 3)
    refused("expected data as loaders, or as arrays .X, y., got some of each", data=[train, FEATURES])
    refused("expected data as loaders .* got a int", data=3)


def test_variants():
    refused("unknown variant 'bach', did you mean 'batch'", variants=("none", "bach"))
    refused("expected two variants or more to compare, got none", variants=("none",))
    refused("got 'none' twice", variants="none,batch,none")
    refused("expected a number after one of ghost", variants=("none", "batch=3"))
    refused("group=3 does not divide a layer's 8 channels", variants=("none", "group=3"))
    refused("instance norm needs", variants=("none", "instance"))
    refused("expected variant 'mine' to give a torch.nn.Module, got int", variants={"none": None, "mine": lambda n: n})


def test_options():
    refused("expected seeds of 1 or more, got 0", seeds=0)
    refused("expected learning rates above 0", lrs=[0.1, -1])
    refused("expected lrs='auto' or a list of rates, got 'best'", lrs="best")
    refused("expected metric to be one of accuracy, balanced-accuracy, loss for classification, got 'r2'", metric="r2")
    refused("expected optimizer to be one of 'sgd'", optimizer="lion")
    refused("amp='fp16' needs CUDA", amp="fp16")
    refused("cannot use the device 'nowhere' here", device="nowhere")
    refused("expected 4 steps or more", steps=2)
    refused("expected a model, data and variants that can go to other processes", lambda n: tiny.make(n), workers=2)
