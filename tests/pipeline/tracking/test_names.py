"""Names of runs."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.common.settings import Settings
from pipeline.tracking.names import changes_text, run_name, setting_name, setup_name


def named(settings: Settings, model: str = "mini", **changes: Any) -> Settings:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return replace(settings, data_name="grammar", model_name=model, changes=keys)


def test_run_name_has_model_data_changes_and_seed(settings: Settings):
    plain = named(settings).with_seed(7)
    assert run_name(plain) == "mini on grammar, seed 7"
    changed = named(settings, model__dropout=0.15, train__max_steps=100).with_seed(2)
    assert run_name(changed) == "mini on grammar, dropout 0.15, 100 steps, seed 2"


def test_setup_name_counts_what_is_beyond_three_changes(settings: Settings):
    changes = {"model__num_heads": 2, "model__d_k": 64, "train__eps": 1e-8, "train__beta2": 0.9}
    assert setup_name(named(settings, **changes)) == "mini on grammar, 2 heads, d_k 64, eps 1e-08 and 1 more"
    changes["tokenize__lowercase"] = True
    assert setup_name(named(settings, **changes)) == "mini on grammar, 2 heads, d_k 64, eps 1e-08 and 2 more"
    del changes["train__eps"], changes["train__beta2"]
    assert setup_name(named(settings, **changes)) == "mini on grammar, 2 heads, d_k 64, lowercase true"


def test_setup_name_of_a_model_of_no_preset_has_its_sizes(settings: Settings):
    custom = replace(named(settings, "custom"), model=replace(settings.model, num_layers=1, d_model=48))
    assert setup_name(custom) == "custom (1 layer, d_model 48) on grammar"


def test_changes_text_has_all_that_was_changed(settings: Settings):
    changes = {"model__num_heads": 2, "model__d_k": 64, "train__eps": 1e-8, "train__beta2": 0.9}
    assert changes_text(named(settings, **changes)) == "2 heads, d_k 64, eps 1e-08, beta2 0.9"
    assert changes_text(named(settings)) == "none"
    assert changes_text(named(settings, "custom")) == "custom"


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("model.num_heads", 1, "1 head"),
        ("model.num_layers", 3, "3 layers"),
        ("train.max_steps", 1, "1 step"),
        ("train.warmup_steps", 40, "40 warmup steps"),
        ("data.train_pairs", 500, "500 training pairs"),
        ("model.positions", "none", "no positions"),
        ("model.positions", "rotary", "rotary positions"),
        ("train.label_smoothing", 0.2, "label smoothing 0.2"),
        ("model.d_ff", 64, "d_ff 64"),
        ("tokenize.lowercase", False, "lowercase false"),
    ],
)
def test_setting_name_is_the_common_name(key: str, value: Any, name: str):
    assert setting_name(key, value) == name
