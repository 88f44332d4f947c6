"""What stands before and after a batch norm: bias, dropout, the end of the model, several callers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import batchnorm as bn


class Calls(nn.Module):
    """Named layers and a forward given as a function of the module."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.how = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.how(self, x)


def layers(found):
    return [(finding.layer, finding.severity) for finding in found]


both = pytest.mark.parametrize("with_example", [True, False])


# BN001


@both
@pytest.mark.parametrize(
    ("linear", "norm", "shape"),
    [
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (5, 3, 6)),
        (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), (2, 3, 6, 6)),
        (nn.ConvTranspose2d(3, 4, 3), bn.nn.BatchNorm2d(4, activation="relu"), (2, 3, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.SyncBatchNorm(4), (2, 4, 6, 6)),
    ],
)
def test_a_bias_that_is_subtracted_again(examine, linear, norm, shape, with_example):
    model = nn.Sequential(linear, norm, nn.ReLU())
    example = torch.randn(shape) if with_example else None
    (found,) = examine(model, "BN001", example=example)
    assert (found.layer, found.severity, found.numbers) == ("0", "info", {"bias": 4, "batch_norm": "1"})
    assert found.message == "its bias (4 values) is subtracted again by 1: no effect, no gradient"
    assert "bias=False" in found.remedy


def test_that_bias_has_no_gradient_and_no_effect():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.double)
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    assert model[0].bias.grad.abs().max() < 1e-12 < model[0].weight.grad.abs().max()
    with torch.no_grad():
        model[0].bias.add_(3.0)
    assert torch.allclose(model(x), y, atol=1e-12)


def frozen(layer):
    return layer.eval()


@both
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Linear(3, 4), frozen(nn.BatchNorm1d(4))),  # in a model in train mode: the bias learns
        nn.Sequential(nn.Linear(3, 4), bn.nn.FrozenBatchNorm1d(4)),
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)),
        Calls(lambda m, x: m.norm(m.fc(x)) + m.fc(x), fc=nn.Linear(3, 4), norm=nn.BatchNorm1d(4)),
        Calls(lambda m, x: (y := m.fc(x), m.norm(y))[0], fc=nn.Linear(3, 4), norm=nn.BatchNorm1d(4)),
        Calls(lambda m, x: m.norm(m.fc(x) * 2), fc=nn.Linear(3, 4), norm=nn.BatchNorm1d(4)),
    ],
)
def test_a_bias_that_counts(examine, model, with_example):
    assert not examine(model, "BN001", example=torch.randn(5, 3) if with_example else None)


def test_a_layer_with_a_forward_of_its_own_or_hooks_is_left_alone(examine):
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    assert not examine(nn.Sequential(Shifted(3, 4), nn.BatchNorm1d(4)), "BN001")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda *_: None)
    assert not examine(model, "BN001")


def test_a_bias_of_other_than_the_channels_counts(examine):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert not examine(model, "BN001", example=torch.randn(5, 4, 3))  # (N, L, C) with L = C


def test_a_frozen_model_in_eval_still_has_the_bias(examine):
    assert layers(examine(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), "BN001")) == [("0", "info")]


# BN002


@both
@pytest.mark.parametrize(
    ("between", "direct"),
    [
        ([], True),
        ([nn.Identity()], True),
        ([nn.Linear(4, 4, bias=False)], False),
        ([nn.ReLU(), nn.Linear(4, 4), nn.GELU()], False),
        ([nn.Dropout(0.0), nn.AlphaDropout(0.5)], True),
    ],
)
def test_dropout_upstream(examine, between, direct, with_example):
    if any(isinstance(layer, nn.AlphaDropout) for layer in between):
        between = between[:1]
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), *between, nn.BatchNorm1d(4), nn.Linear(4, 2))
    (found,) = examine(model, "BN002", example=torch.randn(5, 3) if with_example else None)
    assert (found.layer, found.severity) == (str(2 + len(between)), "warning")
    assert found.numbers == {"p": 0.5, "ratio": 2.0, "direct": direct, "dropout": "1"}
    at_least = "at least" if direct else "about"
    assert found.message == f"1 (p=0.5) upstream: a training batch's variance is {at_least} 2 times that in eval"


def test_the_ratio_of_variances_is_what_the_message_says():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, momentum=None)
    model = nn.Sequential(nn.Dropout(0.5), norm).double()
    x = torch.randn(100000, 4, dtype=torch.double)
    model(x)
    assert torch.allclose(norm.running_var / x.var(0), torch.tensor(2.0).double(), rtol=0.03)


@pytest.mark.parametrize(("p", "severity"), [(0.19, "info"), (0.2, "warning")])
def test_little_dropout_is_an_info(examine, p, severity):
    assert layers(examine(nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(4)), "BN002")) == [("1", severity)]


@pytest.mark.parametrize("kind", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_dropout_of_whole_channels_counts(examine, kind):
    assert layers(examine(nn.Sequential(kind(0.5), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "BN002")) == [
        ("2", "warning")
    ]


@both
def test_dropout_as_a_function(examine, with_example):
    model = Calls(
        lambda m, x: m.norm(m.fc(functional.dropout(x, 0.25, training=m.training))),
        fc=nn.Linear(3, 4),
        norm=nn.BatchNorm1d(4),
    )
    (found,) = examine(model, "BN002", example=torch.randn(5, 3) if with_example else None)
    assert (found.layer, found.numbers["p"], found.numbers["dropout"]) == ("norm", 0.25, "dropout")


@both
def test_another_path_dilutes_it(examine, with_example):
    model = Calls(
        lambda m, x: m.norm(x + m.drop(m.fc(x))), fc=nn.Linear(4, 4), drop=nn.Dropout(0.5), norm=nn.BatchNorm1d(4)
    )
    (found,) = examine(model, "BN002", example=torch.randn(5, 4) if with_example else None)
    assert found.severity == "info"
    assert found.message.endswith("before other paths are added")


@both
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(4)),
        nn.Sequential(nn.AlphaDropout(0.5), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(4), nn.BatchNorm1d(4)),
        nn.Sequential(nn.Dropout(0.5), bn.nn.FrozenBatchNorm1d(4), nn.Linear(4, 4)),
        nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4, track_running_stats=False)),
        nn.Sequential(nn.Dropout(0.5).eval(), nn.BatchNorm1d(4)),  # off in training
        nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4)),
        Calls(lambda m, x: m.norm(x * m.drop(x)), drop=nn.Dropout(0.5), norm=nn.BatchNorm1d(4)),  # a gate
    ],
)
def test_dropout_that_shifts_nothing(examine, model, with_example):
    assert not examine(model, "BN002", example=torch.randn(5, 4) if with_example else None)


def test_the_first_of_two_batch_norms_ends_the_search(examine):
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert layers(examine(model, "BN002")) == [("1", "warning")]


# BN003


@both
@pytest.mark.parametrize("tail", [[], [nn.LogSoftmax(1)], [nn.Identity(), nn.Sigmoid()]])
def test_a_batch_norm_that_ends_the_model(examine, tail, with_example):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2), *tail)
    (found,) = examine(model, "BN003", example=torch.randn(5, 3) if with_example else None)
    assert (found.layer, found.severity, found.numbers) == ("3", "warning", {"features": 2})
    assert "behind the linear layer 2" in found.message


@both
@pytest.mark.parametrize(
    "norm",
    [
        [nn.BatchNorm1d(2), nn.Linear(2, 2)],
        [nn.BatchNorm1d(2), nn.ReLU()],  # features
        [nn.BatchNorm1d(2, affine=False)],  # an embedding
        [bn.nn.BatchNorm1d(2, bias=False)],
        [bn.nn.FrozenBatchNorm1d(2)],
    ],
)
def test_ends_that_are_none(examine, norm, with_example):
    model = nn.Sequential(nn.Linear(3, 2), *norm)
    assert not examine(model, "BN003", example=torch.randn(5, 3) if with_example else None)


def test_a_neck_with_a_frozen_beta_is_an_embedding(examine):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].bias.requires_grad_(False)
    assert not examine(model, "BN003")


def test_a_convolution_may_end_with_one(examine):
    assert not examine(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), "BN003")


# BN004


@both
def test_one_batch_norm_behind_two_layers(examine, with_example):
    model = Calls(
        lambda m, x: m.norm(m.a(x)) + m.norm(functional.relu(m.b(x))),
        a=nn.Linear(3, 4),
        b=nn.Linear(3, 4),
        norm=nn.BatchNorm1d(4),
    )
    (found,) = examine(model, "BN004", example=torch.randn(5, 3) if with_example else None)
    assert (found.layer, found.severity) == ("norm", "warning")
    assert found.message == ("called 2 times in a forward pass by a, b: one average of running statistics for all")
    assert (found.numbers["calls"], found.numbers["feeders"]) == (2, 2)


def test_levels_of_a_pyramid_have_several_sizes(examine):
    model = Calls(
        lambda m, x: [m.norm(m.conv(level)) for level in (x, x[..., ::2, ::2])],
        conv=nn.Conv2d(3, 4, 1),
        norm=nn.BatchNorm2d(4),
    )
    (found,) = examine(model, "BN004", example=torch.randn(2, 3, 8, 8))
    assert (found.severity, found.numbers) == ("warning", {"calls": 2, "feeders": 1, "sizes": 2})


@both
def test_a_siamese_network_is_told_only(examine, with_example):
    model = Calls(
        lambda m, x: m.norm(m.fc(x)) - m.norm(m.fc(-x)), fc=nn.Linear(3, 4, bias=False), norm=nn.BatchNorm1d(4)
    )
    found = examine(model, "BN004", example=torch.randn(5, 3) if with_example else None)
    assert layers(found) == [("norm", "info")]


@both
def test_two_names_for_one_call_are_fine(examine, with_example):
    norm = nn.BatchNorm1d(4)
    model = Calls(lambda m, x: m.norm(m.fc(x)), fc=nn.Linear(3, 4), norm=norm, alias=norm)
    assert not examine(model, "BN004", example=torch.randn(5, 3) if with_example else None)


def test_parts_that_are_read_by_themselves_do_not_count_as_calls(examine):
    def unreadable(module, x):
        return module.block(x) if x.sum() > 0 else x

    norm = nn.BatchNorm1d(4)
    model = Calls(unreadable, block=nn.Sequential(nn.Linear(4, 4), norm), norm=norm)
    assert not examine(model, "BN004")
    assert not examine(model, "BN004", example=torch.ones(5, 4))


def test_without_statistics_nothing_mixes(examine):
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    assert not examine(nn.Sequential(norm, nn.Linear(4, 4), norm), "BN004")
    frozen_norm = bn.nn.FrozenBatchNorm1d(4)
    assert not examine(nn.Sequential(frozen_norm, nn.Linear(4, 4), frozen_norm), "BN004")
    plain = nn.BatchNorm1d(4)
    assert layers(examine(nn.Sequential(plain, nn.Linear(4, 4), plain), "BN004")) == [("0", "warning")]
