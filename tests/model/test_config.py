import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import model.config
from tests.factories import config

PRESETS = Path(__file__).parents[2] / "conf/model"
WHOLE = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "d_k", "d_v", "max_length")


@pytest.mark.parametrize("value", [0, -3, 2.0, "7", True, None])
@pytest.mark.parametrize("name", WHOLE)
def test_config_sizes_are_whole_numbers_from_1_up(name, value):
    message = f"{name} must be a whole number >= 1, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**{name: value})


def test_config_sizes_are_checked_even_if_annotations_are_postponed():
    source = Path(model.config.__file__).read_text(encoding="utf-8")
    module = {"__name__": model.config.__name__}
    exec(compile(f"from __future__ import annotations\n{source}", "config.py", "exec", dont_inherit=True), module)
    assert isinstance(module["TransformerConfig"].__annotations__["d_model"], str)
    with pytest.raises(ValueError, match=r"d_model must be a whole number >= 1, got 2.0"):
        module["TransformerConfig"](**asdict(config()) | {"d_model": 2.0})


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.1", None, True])
def test_config_dropout_is_in_0_to_1(value):
    message = f"dropout must be in [0, 1), got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        config(dropout=value)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("positions", "sinusoid", "sinusoidal, learned, none, relative, rotary, alibi"),
        ("positions", None, "sinusoidal, learned, none, relative, rotary, alibi"),
        ("norm", "rms", "post, pre"),
    ],
)
def test_config_positions_and_norm_are_among_the_known_ones(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be one of {allowed}, got {value!r}")):
        config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 3}, "vocab_size must be > 4, the number of reserved tokens, got 3"),
        ({"d_model": 13}, "d_model must be even with sinusoidal positions, got 13"),
        ({"positions": "rotary", "d_k": 5}, "d_k must be even with rotary positions, got 5"),
    ],
)
def test_config_refuses_sizes_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changes)


@pytest.mark.parametrize("positions", ["learned", "none", "relative", "alibi"])
def test_config_sizes_may_be_odd_where_nothing_is_halved(positions):
    config(positions=positions, d_model=13, d_k=5)


def test_config_vocabulary_has_a_token_besides_the_reserved_ones():
    with pytest.raises(ValueError, match="vocab_size must be > 4"):
        config(vocab_size=4)


# Table 3: N, d_model, d_ff, h, d_k, d_v, P_drop, smoothing, steps; section 6.1: checkpoints averaged.
PUBLISHED = {
    "base": (6, 512, 2048, 8, 64, 64, 0.1, 0.1, 100_000, 5),
    "big": (6, 1024, 4096, 16, 64, 64, 0.3, 0.1, 300_000, 20),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_of_presets_base_and_big_is_the_papers(name):
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    m, t = preset["model"], preset["train"]
    sizes = [m[key] for key in ("num_layers", "d_model", "d_ff", "num_heads", "d_k", "d_v", "dropout")]
    assert (*sizes, t["label_smoothing"], t["max_steps"], t["average_checkpoints"]) == PUBLISHED[name]
    assert (m["positions"], m["norm"]) == ("sinusoidal", "post")
    assert (t["beta1"], t["beta2"], t["eps"], t["warmup_steps"], t["lr_scale"]) == (0.9, 0.98, 1e-9, 4000, 1.0)
    assert (t["batch_tokens"], t["max_grad_norm"]) == (25_000, 0.0)
