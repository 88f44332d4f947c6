"""Domain shift: how images are changed, what is measured on them, and what is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from batchnorm import ConfigError
from batchnorm.study import data, sections
from batchnorm.study.config import PRESETS, StudyConfig
from batchnorm.study.records import Records
from batchnorm.study.sections import domains
from batchnorm.study.shifts import shifts
from study.tiny import TINY

NOTHING = Records(())
CHANGES = shifts(brightness=0.5, contrast=0.3, noise=0.2)


def ignore(step, accuracy):
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(200, 64))


def test_images_are_changed_as_said(images):
    assert set(CHANGES) == set(domains.SHIFTS)
    assert np.array_equal(CHANGES["clean"](images, 0), images)
    np.testing.assert_allclose(CHANGES["brightness"](images, 0) - images, 0.5)
    np.testing.assert_allclose(CHANGES["contrast"](images, 0), 0.3 * images)


def test_noise_is_gaussian_and_of_its_seed(images):
    noise = CHANGES["noise"](images, 1) - images
    assert noise.mean() == pytest.approx(0.0, abs=0.01)
    assert noise.std() == pytest.approx(0.2, rel=0.03)
    assert (np.abs(noise) < 0.2).mean() == pytest.approx(0.683, abs=0.02)
    assert np.array_equal(CHANGES["noise"](images, 1) - images, noise)
    assert abs(np.corrcoef((CHANGES["noise"](images, 2) - images).ravel(), noise.ravel())[0, 1]) < 0.05


def test_blur_is_the_mean_of_nine(images):
    found = CHANGES["blur"](images, 0).reshape(-1, 8, 8)
    whole = images.reshape(-1, 8, 8)
    np.testing.assert_allclose(found[:, 3, 5], whole[:, 2:5, 4:7].mean((1, 2)))
    # In a corner the border is repeated outwards: 4 times the corner, twice each neighbour, once the diagonal one.
    corner = 4 * whole[:, 0, 0] + 2 * whole[:, 0, 1] + 2 * whole[:, 1, 0] + whole[:, 1, 1]
    np.testing.assert_allclose(found[:, 0, 0], corner / 9)


def test_a_displaced_image_is_one_pixel_further_right(images):
    found, whole = CHANGES["moved"](images, 0).reshape(-1, 8, 8), images.reshape(-1, 8, 8)
    assert np.array_equal(found[:, :, 1:], whole[:, :, :-1])
    assert (found[:, :, 0] == 0).all()


def test_the_runs_have_names_of_their_own_and_keep_them():
    runs = domains.plan(PRESETS["default"], NOTHING).runs
    assert [run.id for run in runs] == [
        f"domains/{norm}/seed={seed}" for seed in range(3) for norm in ("none", "batch")
    ]
    assert all(run.cost > 0 for run in runs)


def test_statistics_of_too_few_or_too_many_images_are_refused():
    for few in (1, 301):
        with pytest.raises(ConfigError, match=f"domains.few from 2 to 300 images, got {few}$"):
            StudyConfig.from_toml(f"[domains]\nfew = {few}")


@pytest.fixture(scope="module")
def tiny():
    # Enough steps for predictions that differ from class to class: nothing else tells sorted batches.
    config = dataclasses.replace(TINY, domains=dataclasses.replace(TINY.domains, steps=60))
    lines = [line for run in domains.plan(config, NOTHING).runs for line in sections.execute(run, ignore)]
    return config, Records(tuple(lines))


def test_a_short_run_ends_with_records_and_a_section(tiny):
    config, found = tiny
    assert found.finished() == {run.id for run in domains.plan(config, NOTHING).runs}
    part = domains.summarise(config, found)
    assert part.name == "domains"
    assert len(part.tables[0].rows) == len(domains.SHIFTS)
    assert all(None not in row for row in part.tables[0].rows)
    assert domains.summarise(config, NOTHING) is None
    assert domains.summarise(config, found.where(variant="none")) is None


def test_brightness_and_contrast_are_exact_and_sorted_batches_are_noticed(tiny):
    _, found = tiny
    for shift in ("clean", *domains.EXACT):
        (line,) = found.where(metric="agreement", shift=shift)
        assert line["value"] >= 0.995  # eps, and rounding at a tie
    noticed = found.where(metric="noticed", shift="clean")
    assert {line["way"]: line["value"] for line in noticed} == {"each-shuffled": False, "each-one-class": True}
    sorted_, shuffled = (
        domains.accuracy(found, "batch", "brightness", way).median for way in ("each-one-class", "each-shuffled")
    )
    assert sorted_ < shuffled - 0.2


def test_adapted_answers_are_those_of_statistics_taken_by_hand():
    """One batch is the target: each layer then normalizes with what that batch has there, biased in the pass."""
    run = domains.plan(TINY, NOTHING).runs[1]
    from batchnorm.study.execution import train_mlp

    split = data.digits(run.seed)
    _, model = train_mlp(run, split, ignore)
    model.eval()
    target, tested = split.validation[0][:50] + 0.5, split.test[0] + 0.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = domains._adabn(model, [target], tested)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    passed, asked = target, tested
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            passed, asked = passed @ w.T + b, asked @ w.T + b
        elif isinstance(layer, torch.nn.ReLU):
            passed, asked = np.maximum(passed, 0), np.maximum(asked, 0)
        else:
            gamma, beta = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            mean, variance = passed.mean(0), passed.var(0)
            asked = (asked - mean) / np.sqrt(variance * 50 / 49 + layer.eps) * gamma + beta
            passed = (passed - mean) / np.sqrt(variance + layer.eps) * gamma + beta
    assert (found.numpy() == asked.argmax(1)).mean() > 0.995


def test_alignment_gives_the_training_images_covariance():
    split = data.digits(0)
    target = CHANGES["brightness"](split.validation[0], 0)
    moved = domains._aligned(split, target, target)
    np.testing.assert_allclose(moved.mean(0), split.train[0].mean(0), atol=1e-6)
    there, here = np.cov(split.train[0].T), np.cov(moved.T)
    assert np.linalg.norm(there - here) < 0.1 * np.linalg.norm(there)


SMALL = StudyConfig(sections=("domains",))


def invented(table, *, agreement=1.0, noticed=True):
    """Records of 3 seeds that say ``table``: shift -> way -> accuracy; what is left out is .9."""
    lines = []
    for run in domains.plan(SMALL, NOTHING).runs:
        ways = ("frozen", "coral") if run.variant == "none" else ("frozen", "adabn", "few", "tent", "coral")
        for shift in domains.SHIFTS:
            named = table.get(shift, {})
            for way in (*ways, *(("each-shuffled", "each-one-class") if run.variant == "batch" else ())):
                key = "none" if (run.variant, way) == ("none", "frozen") else way
                value = named.get(key, 0.9)
                value = value[run.seed] if isinstance(value, tuple) else value
                lines.append(run.record(1, "accuracy_shifted", value, shift=shift, way=way))
                if way.startswith("each"):
                    lines.append(run.record(1, "noticed", noticed and way == "each-one-class", shift=shift, way=way))
            if run.variant == "batch":
                lines.append(run.record(1, "agreement", agreement, shift=shift))
    return domains.summarise(SMALL, Records(tuple(lines)))


def test_the_words_of_the_textbook():
    part = invented(
        {
            "brightness": {"frozen": 0.5, "none": 0.7, "each-one-class": 0.3},
            "noise": {"frozen": 0.6, "none": 0.8, "adabn": 0.7, "tent": 0.7},
            "blur": {"frozen": 0.5, "none": 0.6, "adabn": 0.85, "tent": 0.87, "coral": 0.8},
            "clean": {"few": 0.8},
        }
    )
    assert part.headline == (
        "With frozen statistics BN falls, from 90.0% to 50.0% (brightness; without BN 70.0%); statistics of new images "
        "(AdaBN) undo brightness and contrast, which is algebra, and bring blur from 50.0% to 85.0%; with noise the "
        "net without BN stays ahead (80.0% against 70.0%)."
    )
    shown, not_shown = " ".join(part.shows), " ".join(part.does_not_show)
    assert "worse off than the net without it under 3 of 5 changes: brightness 50.0% and 70.0%, noise" in shown
    assert "every image gets the answer of the unchanged one" in shown
    assert (
        "brighter images come to 90.0%; in batches of one class that breaks: 30.0%, worse than not adapting." in shown
    )
    assert "warned of sorted batches in 18 of 18 such cases, and in 0 of 18" in shown
    assert "TENT adds at most 2 points to the statistics that it stands on (blur)." in shown
    assert "the statistics of 16 took accuracy from 90.0% to 80.0%" in not_shown
    assert "ahead of AdaBN (noise 90.0%) and behind AdaBN (blur 80.0%)" in not_shown
    assert "can do no harm" not in not_shown


def test_the_opposite_numbers_give_the_opposite_words():
    part = invented(
        {
            "noise": {"adabn": 0.7, "none": 0.6},
            "blur": {"adabn": (0.85, 0.9, 0.95), "none": 0.7, "tent": 0.9},
            "contrast": {"frozen": 0.8, "none": 0.5},
            "brightness": {"none": 0.5, "each-one-class": 0.95},
            "moved": {"none": 0.5},
        },
        agreement=0.9,
        noticed=False,
    )
    assert part.headline.startswith("With frozen statistics BN holds as the net without does, from 90.0% to 80.0%")
    assert "do NOT wholly undo brightness and contrast" in part.headline
    assert "do NOT bring" in part.headline
    assert part.headline.endswith("the net without BN is ahead of that under no change.")
    shown, not_shown = " ".join(part.shows), " ".join(part.does_not_show)
    assert "no worse off than the net without it under any of the changes" in shown
    assert "at least 90.0% of the images get" in shown
    assert "in batches of one class it holds: 95.0%." in shown
    assert "in 0 of 18 such cases" in shown
    assert "can do no harm: AdaBN took noise from 90.0% to 70.0%" in not_shown
    assert "with blur, the seeds do not agree (-5.0 to +5.0 points)" in not_shown
    assert "That a few images do" not in not_shown


def test_where_nothing_differs_nothing_is_claimed():
    part = invented({})
    assert "TENT adds nothing measurable" in " ".join(part.shows)
    assert "is as good as AdaBN, to what these tests resolve" in " ".join(part.does_not_show)
