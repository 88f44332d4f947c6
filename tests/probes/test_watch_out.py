"""Where records go: scalars, TensorBoard, files, other rooms."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.probes import shift
from probes.watched import inputs, mlp, train


@pytest.fixture
def watch():
    """Three looks at two batch norms."""
    model = mlp(act=nn.ReLU)
    with bn.watch(model, every=2) as watch:
        train(model, inputs(model), steps=5)
    return watch


NAMES = {
    *("dead", "input_mean_median", "input_std_median", "output_mean_median", "output_std_median", "weight_median"),
    *("bias_median", "mean_gap_median", "mean_gap_max", "var_ratio_median", "var_ratio_min", "var_ratio_max"),
    *("grad_norm", "p15", "p50", "p85", "nonfinite"),
}


def test_scalars_of_the_last_look(watch):
    scalars = watch.scalars()
    assert set(scalars) == {f"bn/{layer}/{name}" for layer in ("1", "4") for name in NAMES}
    assert all(type(value) is float for value in scalars.values())
    record = watch.latest("4")
    assert scalars["bn/4/mean_gap_max"] == max(map(abs, record["mean_gap"]))
    assert scalars["bn/4/var_ratio_min"] == min(record["var_ratio"])
    assert scalars["bn/4/grad_norm"] == pytest.approx(sum(g**2 for g in record["grad_norm"]) ** 0.5)
    assert [scalars[f"bn/4/p{level}"] for level in (15, 50, 85)] == record["typical"]
    assert scalars["bn/4/dead"] == record["dead"]


def test_scalars_of_a_step(watch):
    assert watch.scalars(4) == watch.scalars()
    assert watch.scalars(0) != watch.scalars(2)
    with pytest.raises(bn.InputError, match="expected a step that is kept, got 3: the last ones are 0, 2, 4"):
        watch.scalars(3)


def test_names_are_those_that_mlflow_takes():
    model = nn.ModuleDict({"a+b": nn.BatchNorm1d(2), "a*b": nn.BatchNorm1d(2), "gr\u00fcn/x y": nn.BatchNorm1d(2)})
    model.forward = lambda x: [layer(x) for layer in model.values()]
    with bn.watch(model, every=1) as watch:
        assert watch.scalars() == {}
        model(torch.randn(4, 2))
    names = list(watch.scalars())
    assert all(re.fullmatch(r"[/\w.\- ]+", name, re.ASCII) for name in names)
    assert {name.split("/")[1] for name in names} == {"a_b", "a_b_2", "gr_n_x y"}


def test_what_is_not_finite_is_left_out():
    model = nn.Sequential(nn.BatchNorm1d(2))
    x = torch.randn(6, 2)
    x[0, 1] = torch.nan
    with bn.watch(model, every=1) as watch:
        model(x)
        first = watch.scalars()
        model(torch.full((6, 2), torch.inf))
    assert first["bn/0/nonfinite"] == 0.5
    assert first["bn/0/input_mean_median"] == pytest.approx(x[:, 0].mean().item())
    assert watch.scalars()["bn/0/nonfinite"] == 1.0
    assert "bn/0/input_mean_median" not in watch.scalars()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = mlp()
    with SummaryWriter(tmp_path) as writer, bn.watch(model, every=2) as watch:
        train(model, inputs(model), steps=3)
        watch.to_tensorboard(writer)
        train(model, inputs(model), steps=1)
        y = model(inputs(model))
        watch.to_tensorboard(writer)  # the gradients of step 4 are still to come
        y.sum().backward()
        watch.to_tensorboard(writer)
        watch.to_tensorboard(writer)
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(watch.scalars())
    for step in (0, 2, 4):
        for name, value in watch.scalars(step).items():
            events = {event.step: event.value for event in found.Scalars(name)}
            assert list(events) == [0, 2, 4]
            assert events[step] == pytest.approx(value, rel=1e-6)
    expected = {
        f"bn/{n}/{kind}" for n in "14" for kind in ("input", "weight", "bias", "mean_gap", "var_ratio", "grad_norm")
    }
    assert set(found.Tags()["histograms"]) == expected
    weights = found.Histograms("bn/1/weight")
    assert [event.step for event in weights] == [0, 2, 4]
    assert weights[-1].histogram_value.num == 5


def test_files_hold_what_the_records_say(watch, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("old")
    watch.save(path)
    assert bn.probes.load_records(path) == watch.records
    assert [json.loads(line) for line in path.read_text().splitlines()] == watch.records
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_files_that_cannot_be_written_or_read(watch, tmp_path, monkeypatch):
    with pytest.raises(bn.OutputError, match=r"cannot write .*No such file"):
        watch.save(tmp_path / "no" / "records.jsonl")
    path = tmp_path / "records.jsonl"
    path.write_text("old")
    monkeypatch.setattr(bn.probes.Watch, "records", property(lambda _: [{"step": object()}]))
    with pytest.raises(TypeError):
        watch.save(path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    with pytest.raises(bn.RecordsError, match=r"in line 1 of .*, got no JSON"):
        bn.probes.load_records(path)
    path.write_text("[1]")
    with pytest.raises(bn.RecordsError, match=r"expected a record with layer and step in line 1 of .*, got '\[1\]'"):
        bn.probes.load_records(path)
    with pytest.raises(bn.RecordsError, match="cannot read records from"):
        bn.probes.load_records(tmp_path / "none")


def test_the_page_is_the_reports(watch, tmp_path, monkeypatch):
    written = []
    room = ModuleType("batchnorm.report.watch")
    room.write_watch_page = lambda records, path: written.append((records, path))
    monkeypatch.setitem(sys.modules, "batchnorm.report.watch", room)
    watch.to_html(tmp_path / "watch.html")
    assert written == [(watch.records, tmp_path / "watch.html")]


def test_shift_is_that_of_the_records(watch):
    rows = watch.shift()
    assert {row["layer"] for row in rows} == {record["layer"] for record in watch.records}
    assert rows == shift(watch.records)


def test_what_cannot_be_watched_with_or_written_to_is_refused_at_once():
    with pytest.raises(bn.InputError, match=r"expected a torch.nn.Module to watch, got NoneType"):
        bn.watch(None)
    with pytest.raises(bn.InputError, match="expected on_look to be a function of the watch, got 5"):
        bn.watch(nn.BatchNorm1d(3), on_look=5)
    with bn.watch(nn.BatchNorm1d(3)) as watch:
        watch.model(torch.randn(8, 3))
    with pytest.raises(bn.InputError, match=r"expected a SummaryWriter of torch.utils.tensorboard, got 'runs'"):
        watch.to_tensorboard("runs")


def test_the_shift_of_a_short_run_takes_skip_too():
    with bn.watch(nn.BatchNorm1d(3), every=1) as watch:
        for _ in range(3):
            watch.model(torch.randn(8, 3))
    assert watch.shift(skip=0) == bn.probes.shift(watch.records, skip=0) != watch.shift()
