"""The presets, and the choice of the preset after which a run is named."""

import pytest
import yaml

from pipeline.common.presets import PRESETS, find_preset, nearest_preset, preset_files
from pipeline.common.settings import SECTIONS, load_settings
from tests.support.settings_files import REPOSITORY

ALL = [(kind, name) for kind in PRESETS for name in preset_files(REPOSITORY, kind)]


def values_with(kind: str, name: str) -> dict:
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    return values | yaml.safe_load(find_preset(REPOSITORY, kind, name).read_text())


def test_presets_are_the_folders_of_conf_and_cover_known_sections():
    assert sorted(path.name for path in (REPOSITORY / "conf").iterdir()) == sorted(PRESETS)
    assert {section for sections in PRESETS.values() for section in sections} <= set(SECTIONS)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_presets_are_whole_and_valid(kind, name):
    preset = yaml.safe_load(find_preset(REPOSITORY, kind, name).read_text())
    assert tuple(preset) == PRESETS[kind]
    load_settings(REPOSITORY, **{kind: name})


@pytest.mark.parametrize(("kind", "name"), [case for case in ALL if case[0] != "hardware"])
def test_nearest_preset_of_a_presets_own_values_is_that_preset(kind, name):
    assert nearest_preset(REPOSITORY, kind, values_with(kind, name)) == (name, {})


def test_nearest_preset_names_what_differs():
    values = values_with("model", "tiny")
    values["model"]["d_k"] = 5
    values["train"]["max_steps"] = 77
    assert nearest_preset(REPOSITORY, "model", values) == ("tiny", {"model.d_k": 5, "train.max_steps": 77})


def test_nearest_preset_weighs_sizes_above_training():
    values = values_with("model", "tiny")
    values["train"] = yaml.safe_load(find_preset(REPOSITORY, "model", "base").read_text())["train"]
    assert nearest_preset(REPOSITORY, "model", values)[0] == "tiny"


def test_nearest_preset_of_a_model_far_from_all_is_custom():
    values = values_with("model", "base")
    values["model"] |= {"num_layers": 3, "d_model": 74, "d_ff": 91, "num_heads": 7, "d_k": 13, "d_v": 17}
    assert nearest_preset(REPOSITORY, "model", values) == ("custom", {})


def test_nearest_preset_of_a_corpus_of_other_sizes_is_that_of_the_corpus():
    values = values_with("data", "grammar")
    sizes = {"train_pairs": 7, "valid_pairs": 5, "test_pairs": 3}
    values["data"] |= sizes
    changes = {f"data.{key}": value for key, value in sizes.items()}
    assert nearest_preset(REPOSITORY, "data", values) == ("grammar", changes)


def test_nearest_preset_names_a_corpus_of_other_languages_after_them():
    values = values_with("data", "own")
    values["data"]["tgt"] = "cs"
    assert nearest_preset(REPOSITORY, "data", values) == ("own-en-cs", {})


def test_find_preset_lists_the_presets():
    with pytest.raises(ValueError, match="model must be one of base, big, .*, got 'huge'"):  # noqa: RUF043
        find_preset(REPOSITORY, "model", "huge")
    with pytest.raises(
        ValueError, match="a preset must be one of data=NAME, model=NAME, hardware=NAME, got modl=tiny"
    ):
        find_preset(REPOSITORY, "modl", "tiny")
