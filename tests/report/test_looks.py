from __future__ import annotations

import math

import pytest

from batchnorm._errors import RecordsError
from batchnorm.report.looks import layers_of, look_of, percent, worst_first
from report.watch_samples import nasty, record, run


def test_a_record_in_few_numbers() -> None:
    look = look_of(
        record(20, units=3, mean_gap=[0.1, -0.9, None], var_ratio=[0.25, 2.0, None], grad_norm=[3.0, 4.0, None])
        | {"units": [0, 31, 63], "weight": [1.0, 2.0, None], "saturated": 0.5}
    )
    assert (look.step, look.gap, look.gap_channel, look.ratio) == (20, 0.9, 31, (0.25, 2.0))
    assert look.furthest == 0.25
    assert look.factor == pytest.approx(4.0)
    assert look.spread == pytest.approx(math.log(4.0))
    assert (look.dead, look.saturated, look.gradient) == (0.125, 0.5, 5.0)
    assert look.weight == (pytest.approx(1.15), 1.5, pytest.approx(1.85))
    assert look.severity == look.spread


def test_severity_is_that_of_the_worst_measure() -> None:
    fine = {"mean_gap": [0.1], "var_ratio": [1.1], "dead": 0.0, "units": [0]}
    assert look_of(record(0, units=1) | fine).severity == pytest.approx(0.1)
    for worse in ({"mean_gap": [-0.7]}, {"var_ratio": [math.exp(-0.7)]}, {"dead": 0.7}, {"saturated": 0.7}):
        assert look_of(record(0, units=1) | fine | worse).severity == pytest.approx(0.7)
    assert look_of(record(0, units=1) | fine | {"var_ratio": [0.0]}).severity == math.inf
    assert look_of(record(0, units=2) | {"mean": [1.0, None]}).severity == math.inf
    # An empty batch has no values, and none that are not finite.
    assert look_of(record(0, units=2, mean=[None, None], count=0)).finite


def test_layers_in_the_models_order_and_the_worst_first() -> None:
    layers = layers_of(reversed(run(3)))
    assert [layer.name for layer in layers] == ["features.2.norm", "features.1.norm", "features.0.norm"]
    assert [look.step for look in layers[0].looks] == list(range(0, 400, 20))
    assert worst_first(layers_of(run(3, dead=0.0)))[0].name == "features.2.norm"


def test_looks_in_training_come_before_those_in_evaluation() -> None:
    layers = {layer.name: layer for layer in layers_of(nasty())}
    assert layers["features.0.norm"].mode == "train"
    assert layers_of([record(0, mode="eval")])[0].mode == "eval"
    assert (layers[""].title, layers[""].said) == ("the model", "the model")
    assert not layers[""].last.finite


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(RecordsError, match="expected records of a watch, got none: look at a training step"):
        layers_of([])
    with pytest.raises(RecordsError, match="with step, layer and mode; got one without 'mode'"):
        layers_of([{"step": 1, "layer": "a"}])


def test_shares_are_written_short() -> None:
    assert [percent(share) for share in (0.0, 0.125, 0.00133, 1.0)] == ["0%", "12.5%", "0.133%", "100%"]
