"""The two sections on files: a tiny run on made ones ends with a section, and the words follow the numbers."""

from __future__ import annotations

import dataclasses

import pytest

from batchnorm import InputError
from batchnorm.study import RunFailedError, events, run_study, sections, summarise, summary
from batchnorm.study.config import OPT_IN, PRESETS
from batchnorm.study.records import Records, read
from study import made_images
from study.tiny import TINY


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with small files of both sets."""
    folder = tmp_path_factory.mktemp("data")
    made_images.mnist(folder)
    return made_images.cifar10(folder)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A finished tiny study of both sections, and its events."""
    folder, seen = tmp_path_factory.mktemp("images") / "run", []
    config = TINY.with_options(sections=OPT_IN, data_dir=str(data))
    run_study(config, folder, workers=1, on_event=seen.append)
    return folder, seen


def test_they_run_only_where_they_are_asked_for():
    assert OPT_IN == ("mnist", "cifar10")
    for preset in PRESETS.values():
        assert not set(OPT_IN) & set(preset.sections)
    assert PRESETS["full"].mnist.steps == 50_000  # the paper's
    assert PRESETS["quick"].mnist.steps < PRESETS["default"].mnist.steps < 50_000


def test_the_document(whole, data):
    document = summarise(whole[0])
    assert document.complete
    assert document.config["data_dir"] == str(data)
    mnist, cifar10 = document.sections
    assert mnist.headline == (
        "The paper's net on MNIST: with BN the net did NOT reach 90% within 6 steps; best test accuracy "
        f"{mnist.headline.split('accuracy ')[1]}"
    )
    assert [figure.id for figure in mnist.figures] == ["mnist-accuracy", "mnist-input-none", "mnist-input-batch"]
    assert mnist.setup["data"] == (
        "MNIST's format, 120 train and 40 test images; NOT the published files (other SHA-256)"
    )
    assert cifar10.setup["data"].startswith(
        "CIFAR-10's binary version, 100 train and 20 test images; NOT the published"
    )
    assert mnist.does_not_show[0] == "What MNIST would: the files in the folder are not the published ones."
    assert "this run has 6 steps, the paper's has 50000" in " ".join(mnist.does_not_show)


def test_the_user_is_told_of_other_files(whole):
    notes = [event.text for event in whole[1] if isinstance(event, events.Noted)]
    assert [note.split(" in ")[0].split(", ")[-1] for note in notes] == ["t10k-labels-idx1-ubyte", "test_batch.bin"]
    assert all("not the published" in note for note in notes)


def test_the_same_seed_gives_the_same_records(whole, data, tmp_path):
    config = TINY.with_options(sections=OPT_IN, data_dir=str(data))
    run_study(config, tmp_path / "run", workers=2)
    lines = [
        [line for line in read(folder / "records.jsonl") if line["metric"] != "seconds"]
        for folder in (whole[0], tmp_path / "run")
    ]
    assert lines[0] == lines[1]


def test_both_variants_begin_with_the_same_accuracy_grid(whole):
    found = read(whole[0] / "records.jsonl")
    for section in OPT_IN:
        steps = {
            tuple(step for step, _ in found.where(run=run).curve("accuracy"))
            for run in found.where(section=section).distinct("run")
        }
        assert len(steps) == 1


def test_without_a_folder_nothing_is_begun(tmp_path):
    with pytest.raises(InputError, match="section mnist needs the files of MNIST: name their folder with --data-dir"):
        run_study(TINY.with_options(sections=("mnist",)), tmp_path / "run", workers=1)
    assert not (tmp_path / "run").exists()


def test_data_that_went_away_are_a_failed_run(tmp_path):
    """The check before the start cannot keep a disc mounted."""
    run = sections.plan("mnist", TINY.with_options(data_dir=str(tmp_path)), Records(())).runs[0]
    with pytest.raises(InputError, match=r"lacks train-images-idx3-ubyte"):
        sections.execute(run, lambda *_: None)


def invented(section, accuracies, published=True, **options):
    """Records in which the nets' accuracies over the steps are ``accuracies``: variant -> values at 0, 100, 200, ..."""
    wanted = dataclasses.replace(getattr(TINY, section), seeds=3, lrs=(0.1,), steps=10_000)
    config = dataclasses.replace(TINY, sections=(section,), data_dir="d", **{section: wanted})
    lines = []
    for run in sections.plan(section, config, Records(())).runs:
        lines += [run.record(0, "images", [60000, 10000]), run.record(0, "published", published)]
        values = accuracies[run.variant]
        lines += [run.record(100 * place, "accuracy", value) for place, value in enumerate(values)]
        lines.append(run.record(10_000, "seconds", options.get("step", {}).get(run.variant, 0.001), what="step"))
        lines += [run.record(200 * place, "percentiles", [-1.0, 0.0, 1.0]) for place in range(3)]
        moved = options.get("moved", {}).get(run.variant, 1.0)
        lines += [run.record(200, "movement", moved), run.record(200, "movement_absolute", moved), run.finished(10_000)]
    return summary.build(config, Records(tuple(lines))).sections[0]


FAST, SLOW, NEVER = [0.1, 0.92, 0.96, 0.97], [0.1, 0.3, 0.92, 0.93], [0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("accuracies", "headline"),
    [
        ({"none": SLOW, "batch": FAST}, "90% after 100 steps with BN and 200 without it, 2 x as many"),
        ({"none": FAST, "batch": SLOW}, "BN was NOT faster to 90%: 200 steps, 100 without it"),
        ({"none": NEVER, "batch": FAST}, "90% after 100 steps with BN, never within 10000 without it"),
        ({"none": FAST, "batch": NEVER}, "with BN the net did NOT reach 90% within 10000 steps"),
    ],
)
def test_the_headline_on_mnist_follows_the_numbers(accuracies, headline):
    section = invented("mnist", accuracies)
    assert section.headline.startswith(f"The paper's net on MNIST: {headline}; best test accuracy ")
    assert "the published files (SHA-256)" in section.setup["data"]
    assert "NOT the published" not in section.setup["data"]
    assert not [line for line in section.does_not_show if "not the published" in line]


@pytest.mark.parametrize(("batch", "verdict"), [(0.2, "is steadier with BN"), (2.0, "is NOT steadier with BN")])
def test_the_verdict_on_steadiness_follows_the_numbers(batch, verdict):
    section = invented("mnist", {"none": SLOW, "batch": FAST}, moved={"batch": batch, "none": 1.0})
    assert [line for line in section.shows if verdict in line]


@pytest.mark.parametrize(
    ("accuracies", "headline"),
    [
        (
            {"none": [0.1, 0.4, 0.5, 0.52], "batch": [0.1, 0.6, 0.7, 0.7]},
            "In 10000 steps a convnet on CIFAR-10 gets to 70.0% with BN, 50.0% without it; half of the test images "
            "right after 100 steps with and after 200 steps without.",
        ),
        (
            {"none": [0.1, 0.6, 0.7, 0.7], "batch": [0.1, 0.2, 0.3, 0.3]},
            "BN did NOT help a convnet on CIFAR-10 within 10000 steps: 30.0% with BN, 70.0% without it; half of the "
            "test images right never with and after 100 steps without.",
        ),
    ],
)
def test_the_headline_on_cifar10_follows_the_numbers(accuracies, headline):
    section = invented("cifar10", accuracies, step={"none": 0.001, "batch": 0.0015})
    assert section.headline == headline
    assert "a step with BN took 1.5 times as long" in section.shows[0]


def test_a_failed_read_in_a_worker_is_told(data, tmp_path, monkeypatch):
    from batchnorm.study import datasets

    monkeypatch.setattr(datasets, "load", lambda *_: (_ for _ in ()).throw(InputError("the disc is gone")))
    config = TINY.with_options(sections=("mnist",), data_dir=str(data))
    with pytest.raises(RunFailedError, match=r"^run mnist/\S+ failed: InputError: the disc is gone; finished runs are"):
        run_study(config, tmp_path / "run", workers=1)
