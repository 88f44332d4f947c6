"""Records: whole runs or nothing, and damage named by its line."""

from __future__ import annotations

import json

import pytest

from batchnorm import OutputError, RecordsError
from batchnorm.study import records
from batchnorm.study.plan import Run, run_id


def block(seed, values=(0.1, 0.9)):
    run = Run(run_id("deep", "plain", "batch", lr=0.3, seed=seed), "deep", "batch", seed, 4, 1.0, labels={"lr": 0.3})
    return [*(run.record(2 * step, "accuracy", value) for step, value in enumerate(values)), run.finished(4)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


def test_ids_are_stable():
    assert run_id("headline", "tuned", "batch", lr=2.0, seed=0) == "headline/tuned/batch/lr=2/seed=0"
    assert run_id("deep", lr=0.25, seed=11) == "deep/lr=0.25/seed=11"


def test_what_is_appended_is_read(path):
    for seed in (1, 0):
        records.append(path, block(seed))
    found = records.read(path)
    assert list(found) == block(1) + block(0)
    assert found.dropped == ""
    assert found.finished() == {"deep/plain/batch/lr=0.3/seed=1", "deep/plain/batch/lr=0.3/seed=0"}
    assert all(isinstance(json.loads(line)["seed"], int) for line in path.read_text().splitlines())


def test_queries(path):
    records.append(path, block(0))
    found = records.read(path)
    assert found.curve("accuracy") == ((0, 0.1), (2, 0.9))
    assert found.value("accuracy") == 0.9
    assert found.value("loss", "none") == "none"
    assert len(found.where(metric="accuracy", lr=0.3)) == 2
    assert len(found.where(lr=1.0)) == 0
    assert found.distinct("step") == (0, 2, 4)


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_tail_cut_in_the_middle_of_a_line(path, cut):
    records.append(path, block(0))
    whole = path.read_bytes()
    records.append(path, block(1))
    torn = path.read_bytes()[:-cut]
    path.write_bytes(torn)
    found = records.read(path)
    if cut == 1:  # the newline alone is missing: the record is whole
        assert found.finished() == {"deep/plain/batch/lr=0.3/seed=0", "deep/plain/batch/lr=0.3/seed=1"}
    else:
        assert list(found) == block(0)
        assert found.dropped == (
            "dropped a line cut in the middle and 2 records of the unfinished run deep/plain/batch/lr=0.3/seed=1"
        )
    assert path.read_bytes() == torn  # reading changes nothing
    assert list(records.repair(path)) == list(found)
    assert path.read_bytes() == (whole if cut > 1 else torn + b"\n")
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_appending_after_a_repair_gives_a_whole_file(path):
    records.append(path, block(0))
    path.write_bytes(path.read_bytes() + b'{"section": "de')
    records.repair(path)
    records.append(path, block(1))
    assert list(records.read(path)) == block(0) + block(1)


@pytest.mark.parametrize("damage", ['{"section": "deep", "val', "[1, 2]", "null", '{"section": "deep"}', ""])
def test_damage_before_the_end_is_named_by_its_line(path, damage):
    records.append(path, block(0))
    lines = path.read_text().splitlines()
    lines[1] = damage
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for of in (records.read, records.repair):
        with pytest.raises(RecordsError, match=r"records\.jsonl, line 2: expected a record as JSON") as caught:
            of(path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_missing_file(path):
    with pytest.raises(RecordsError, match="cannot read the records"):
        records.read(path)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        records.append(tmp_path / "no" / "records.jsonl", block(0))
    with pytest.raises(OutputError, match="cannot write"):
        records.write_whole(tmp_path / "no" / "summary.json", b"")


def test_no_number_that_json_has_not(path):
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append(path, block(0, (float("nan"),)))
    assert not path.exists()
