"""Configuration: TOML there and back, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from batchnorm import ConfigError
from batchnorm.study import PRESETS, SECTIONS, StudyConfig
from batchnorm.study.config import SECTION_NAMES, differences


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_toml(name):
    config = PRESETS[name]
    assert config.preset == name
    assert StudyConfig.from_toml(config.to_toml()) == config


def test_every_value_survives_toml():
    config = dataclasses.replace(
        PRESETS["default"].with_options(seed=7, seeds=4, sections=("identity", "deep")), batch=32
    )
    again = StudyConfig.from_toml(config.to_toml())
    assert again == config
    assert again.sections == ("deep", "identity")  # the page's order


def test_a_file_holds_only_what_differs():
    config = StudyConfig.from_toml("seeds = 4\n[headline]\nlrs = [1, 2.5]\n")
    assert config.seeds == 4
    assert config.headline.lrs == (1.0, 2.5)
    assert config.headline.steps == StudyConfig().headline.steps


def test_a_preset_is_the_ground_of_a_file():
    assert StudyConfig.from_toml('preset = "quick"\nseed = 3').deep == PRESETS["quick"].deep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sedes = 3", r"my\.toml: unknown key 'sedes', expected one of preset, seed, seeds"),
        ("[headline]\nlr = 3.0", r"my\.toml: unknown key 'lr' in \[headline\], expected one of seeds, lrs"),
        ("seeds = 'three'", r"my\.toml: seeds: expected int, got 'three'"),
        ("seeds = true", r"my\.toml: seeds: expected int, got True"),
        ("seeds = 1.5", r"my\.toml: seeds: expected int, got 1\.5"),
        ("seeds = 0", r"my\.toml: expected a positive seeds, got 0"),
        ("seed = -1", r"my\.toml: expected seed of 0 or more, got -1"),
        ("[deep]\nlrs = []", r"my\.toml: deep\.lrs: expected a list of float, got \[\]"),
        ("[deep]\nlrs = [1, nan]", r"my\.toml: expected a positive deep\.lrs, got nan"),
        ("[deep]\nlrs = [1, inf]", r"my\.toml: expected a positive deep\.lrs, got inf"),
        ("deep = 3", r"my\.toml: expected a table for 'deep', got 3"),
        ("sections = ['depp']", r"my\.toml: unknown section 'depp': expected some of headline, deep"),
        ("preset = 'huge'", r"my\.toml: unknown preset 'huge', expected one of default, quick"),
        ("seeds = ", r"my\.toml is not valid TOML: "),
    ],
)
def test_refusals_name_the_file_the_key_and_what_is_allowed(tmp_path, text, message):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        StudyConfig.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml"):
        StudyConfig.load(tmp_path / "none.toml")


def test_no_section_is_refused():
    with pytest.raises(ConfigError, match="at least one section"):
        StudyConfig(sections=())


def test_seeds_begin_at_the_base_seed():
    config = StudyConfig().with_options(seed=10, seeds=2)
    assert config.seed_list() == (10, 11)
    assert config.seed_list("headline") == (10, 11)
    assert StudyConfig().seed_list("headline") == (0, 1, 2, 3, 4)


def test_differences_are_named():
    other = dataclasses.replace(StudyConfig(), batch=30, deep=dataclasses.replace(StudyConfig().deep, layers=9))
    assert differences(StudyConfig(), other) == ["batch: 60 saved, 30 asked", "deep.layers: 6 saved, 9 asked"]


def test_the_titles_are_those_of_the_sections():
    assert tuple(SECTIONS) == SECTION_NAMES


def test_defaults_keep_their_promise():
    """At least three seeds everywhere, five in the headline; three in a quick look's."""
    assert (PRESETS["default"].headline.seeds, PRESETS["default"].seeds) == (5, 3)
    assert PRESETS["quick"].headline.seeds == 3
