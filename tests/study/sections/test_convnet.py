"""Convnets: the nets, the plan, and words that follow the numbers, in steps and in time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from batchnorm.nn import BatchNorm2d
from batchnorm.study import models, sections, summary
from batchnorm.study.config import StudyConfig
from batchnorm.study.records import Records
from batchnorm.study.settings.convnet import Convnet
from study.tiny import TINY

CONFIG = StudyConfig(sections=("convnet",), convnet=Convnet(lrs=(0.3,), deep_depth=4, deep_lrs=(0.1, 0.3), steps=300))


@pytest.mark.parametrize(("depth", "stages"), [(1, 2), (3, 2), (2, 3)])
def test_the_net_is_as_deep_as_asked_for(depth, stages):
    nets = [models.convnet(3, 10, seed=1, width=4, norm=norm, depth=depth, stages=stages) for norm in ("none", "batch")]
    for net, norms in zip(nets, (0, depth * stages), strict=True):
        convolutions = [part for part in net if isinstance(part, torch.nn.Conv2d)]
        assert [part.out_channels for part in convolutions] == [4 * 2**s for s in range(stages) for _ in range(depth)]
        assert len([part for part in net if isinstance(part, BatchNorm2d)]) == norms
        assert len([part for part in net if isinstance(part, torch.nn.MaxPool2d)]) == stages
        assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    first, second = ([part.weight for part in net if isinstance(part, torch.nn.Conv2d)] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_plan_is_whole_and_stable():
    runs = sections.plan("convnet", CONFIG, Records(())).runs
    assert len({run.id for run in runs}) == len(runs) == 3 * (2 + 4)
    assert runs[0].id == "convnet/shallow/none/lr=0.3/seed=0"


def test_a_run_ends_with_records():
    run = sections.plan("convnet", dataclasses.replace(TINY, sections=("convnet",)), Records(())).runs[-1]
    block = sections.execute(run, lambda *_: None)
    assert block[-1]["metric"] == "finished"
    assert [line["step"] for line in block if line["metric"] == "accuracy"] == [0, 5, 6]
    assert {line["case"] for line in block} == {"deep"}


def invented(arrivals, seconds):
    """The section from records in which a net is at 90% at the step of ``arrivals`` and at 95% at twice that."""
    lines = []
    for run in sections.plan("convnet", CONFIG, Records(())).runs:
        key = (run.labels["case"], run.variant, run.labels["lr"])
        step = arrivals.get(key, arrivals.get(key[:2]))
        for at in range(0, 301, 10):
            value = 0.1 if step is None or at < step else 0.96 if at >= 2 * step else 0.91
            lines.append(run.record(at, "accuracy", value))
        lines += [run.record(300, "seconds", seconds[run.variant], what="step"), run.finished(300)]
    return summary.build(CONFIG, Records(tuple(lines))).sections[0]


SECONDS = {"none": 0.002, "batch": 0.003}


def test_bn_that_is_faster():
    section = invented(
        {
            ("shallow", "none"): 120,
            ("shallow", "batch"): 30,
            ("deep", "none", 0.1): 100,
            ("deep", "none", 0.3): None,
            ("deep", "batch", 0.1): 60,
            ("deep", "batch", 0.3): 50,
        },
        SECONDS,
    )
    assert section.headline == (
        "A convnet of 2 convolutions reaches 90% in 4 times fewer steps with BN (30 instead of 120), 2.67 x in time; a "
        "convnet of 8 convolutions reaches 90% in 2 times fewer steps with BN (50 instead of 100), 1.33 x in time."
    )
    assert section.shows[0] == (
        "2 convolutions, best rate tried for each (0.3 without BN, 0.3 with it): 95% after 240 steps without BN, "
        "after 60 steps with it; a step with BN took 1.5 times as long (median processor time, one thread, our layer)."
    )
    assert "8 convolutions at the rate 0.3: stuck near chance without BN, at 90% with it." in section.shows
    assert "That 8 convolutions gain much in time: 1.33 x to 90%." in section.does_not_show
    assert not any("That 2 convolutions gain much" in line for line in section.does_not_show)


@pytest.mark.parametrize(
    ("plain", "batch", "told"),
    [
        (50, 100, "reaches 90% in 2 times the steps, NOT fewer, with BN (100 instead of 50)"),
        (50, None, "did NOT reach 90% with BN (50 steps without)"),
        (None, 50, "reaches 90% in 50 steps with BN and not within 300 without it"),
    ],
)
def test_other_outcomes_are_told(plain, batch, told):
    section = invented(
        {(case, n): s for case in ("shallow", "deep") for n, s in (("none", plain), ("batch", batch))}, SECONDS
    )
    assert section.headline.startswith(f"A convnet of 2 convolutions {told}")
    cannot = [line for line in section.does_not_show if "cannot be trained without BN" in line]
    assert bool(cannot) == (plain is not None)
