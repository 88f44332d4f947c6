"""A comparison that is interrupted, at whichever point, ends with the same records."""

from __future__ import annotations

import json
import shutil

import pytest

import batchnorm as bn
from batchnorm.study import events
from study.comparison import tiny
from study.comparison.tiny import compare, measured

OPTIONS = {"lrs": [0.03, 0.1, 0.3], "steps": 16, "seeds": 1, "checkpoint_every": 0.0}


class Killed(BaseException):
    """Stands for a kill."""


def stop_at(place):
    """An ``on_event`` that ends everything at its event number ``place``."""
    seen = []

    def on_event(event):
        seen.append(event)
        if len(seen) == place:
            raise Killed

    return on_event


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return compare(out=tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


@pytest.mark.parametrize("place", [1, 3, 8, 30, 47, 60, 90])
def test_killed_anywhere_it_ends_with_the_same_records(whole, tmp_path, place):
    with pytest.raises(Killed):
        compare(out=tmp_path, on_event=stop_at(place), **OPTIONS)
    again = compare(out=tmp_path, resume=True, **OPTIONS)
    assert measured(again) == measured(whole)
    assert not (tmp_path / "states").exists()


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    seen = []

    def stop(event):
        if isinstance(event, events.RunProgress) and event.section == "measure" and event.step >= 8:
            raise Killed

    with pytest.raises(Killed):
        compare(out=tmp_path, on_event=stop, **OPTIONS)
    compare(out=tmp_path, resume=True, on_event=seen.append, **OPTIONS)
    steps = [event.step for event in seen if isinstance(event, events.RunProgress) and event.variant == "none"]
    assert min(steps) >= 6
    assert any(isinstance(event, events.StudyResumed) and event.finished > 5 for event in seen)


def test_without_its_states_it_begins_runs_anew_and_ends_the_same(whole, tmp_path):
    with pytest.raises(Killed):
        compare(out=tmp_path, on_event=stop_at(45), **OPTIONS)
    shutil.rmtree(tmp_path / "states")
    assert measured(compare(out=tmp_path, resume=True, **OPTIONS)) == measured(whole)


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file"])
def test_a_damaged_state_is_left_out(whole, tmp_path, damage):
    with pytest.raises(Killed):
        compare(out=tmp_path, on_event=stop_at(45), **OPTIONS)
    states = list((tmp_path / "states").iterdir())
    assert states
    for path in states:
        path.write_bytes(damage)
    assert measured(compare(out=tmp_path, resume=True, **OPTIONS)) == measured(whole)


def test_adam_goes_on_too(tmp_path):
    options = OPTIONS | {"optimizer": "adam", "lrs": [0.01], "variants": ("none", "renorm")}
    with pytest.raises(Killed):
        compare(out=tmp_path / "a", on_event=stop_at(9), **options)
    again = compare(out=tmp_path / "a", resume=True, **options)
    assert measured(again) == measured(compare(out=tmp_path / "b", **options))


def test_loaders_that_shuffle_go_on_too(tmp_path):
    options = OPTIONS | {"lrs": [0.1], "steps": 30}
    with pytest.raises(Killed):
        compare(data=tiny.loaders(), out=tmp_path / "a", on_event=stop_at(20), **options)
    again = compare(data=tiny.loaders(), out=tmp_path / "a", resume=True, **options)
    assert measured(again) == measured(compare(data=tiny.loaders(), out=tmp_path / "b", **options))


def test_a_torn_line_is_cut_off(whole, tmp_path):
    with pytest.raises(Killed):
        compare(out=tmp_path, on_event=stop_at(45), **OPTIONS)
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(b'{"section": "mea')
    assert measured(compare(out=tmp_path, resume=True, **OPTIONS)) == measured(whole)


def test_what_is_there_so_far_is_a_document(tmp_path):
    pytest.importorskip("plotly")
    from batchnorm import report

    for place in (1, 20, 62):
        with pytest.raises(Killed):
            compare(out=tmp_path / str(place), on_event=stop_at(place), **OPTIONS)
        summary = bn.study.summarise(tmp_path / str(place))
        assert not summary.complete
        assert "not finished" in summary.overview.note
        assert report.rebuild(tmp_path / str(place)).exists()


def test_a_finished_comparison_is_not_done_again(whole, tmp_path):
    compare(out=tmp_path, **OPTIONS)
    seen = []
    again = compare(out=tmp_path, resume=True, on_event=seen.append, **OPTIONS)
    assert not any(isinstance(event, events.RunStarted) for event in seen)
    assert measured(again) == measured(whole)
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is True


def test_other_data_another_model_or_other_settings_are_refused(tmp_path):
    compare(out=tmp_path, **OPTIONS)
    with pytest.raises(bn.ConfigError, match=r"cannot go on with this comparison: seeds = 4 where it began with 1"):
        compare(out=tmp_path, resume=True, **(OPTIONS | {"seeds": 4}))
    features, labels = tiny.arrays()
    with pytest.raises(bn.ConfigError, match="other data or another model"):
        compare(data=(features + 1, labels), out=tmp_path, resume=True, **OPTIONS)
    with pytest.raises(bn.ConfigError, match="other data or another model"):
        compare(tiny.plain, out=tmp_path, resume=True, **OPTIONS)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(bn.RecordsError, match=r"already holds other files \(note.txt\)"):
        compare(out=tmp_path, **OPTIONS)
    with pytest.raises(bn.InputError, match="expected out= with resume=True"):
        compare(resume=True, **OPTIONS)
