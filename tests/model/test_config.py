import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import TransformerConfig

PRESETS = Path(__file__).parents[2] / "conf/model"
SMALL: dict[str, Any] = {
    "vocab_size": 23, "num_layers": 2, "d_model": 26, "d_ff": 17, "num_heads": 3, "d_k": 10, "d_v": 7,
    "dropout": 0.1, "positions": "sinusoidal", "norm": "post", "max_length": 41,
}  # fmt: skip
WHOLE = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "d_k", "d_v", "max_length")


@pytest.mark.parametrize("value", [0, -3, 2.0, "7", True, None])
@pytest.mark.parametrize("name", WHOLE)
def test_a_size_is_a_whole_number_from_1_up(name, value):
    message = f"{name} is {value!r}: a whole number from 1 up is needed"
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerConfig(**SMALL | {name: value})


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "0.1", None, True])
def test_dropout_is_a_share_below_1(value):
    message = f"dropout is {value!r}: a number from 0 up to, not including, 1 is needed"
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerConfig(**SMALL | {"dropout": value})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("positions", "sinusoid", "sinusoidal, learned, none, relative, rotary, alibi"),
        ("positions", None, "sinusoidal, learned, none, relative, rotary, alibi"),
        ("norm", "rms", "post, pre"),
    ],
)
def test_positions_and_norm_are_among_those_that_there_are(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}: one of {allowed} is needed")):
        TransformerConfig(**SMALL | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 3}, "vocab_size is 3: more than the 4 reserved pieces are needed"),
        ({"d_model": 13}, "d_model is 13: sinusoidal positions need an even number"),
        ({"positions": "rotary", "d_k": 5}, "d_k is 5: rotary positions need an even number"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TransformerConfig(**SMALL | changes)


@pytest.mark.parametrize("positions", ["learned", "none", "relative", "alibi"])
def test_sizes_may_be_odd_where_nothing_is_halved(positions):
    TransformerConfig(**SMALL | {"positions": positions, "d_model": 13, "d_k": 5})


def test_a_vocabulary_must_hold_a_piece_beside_the_reserved_ones():
    with pytest.raises(ValueError, match="vocab_size is 4"):
        TransformerConfig(**SMALL | {"vocab_size": 4})


# Table 3: N, d_model, d_ff, h, d_k, d_v, P_drop, smoothing, steps; section 6.1: checkpoints averaged.
PUBLISHED = {
    "base": (6, 512, 2048, 8, 64, 64, 0.1, 0.1, 100_000, 5),
    "big": (6, 1024, 4096, 16, 64, 64, 0.3, 0.1, 300_000, 20),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_base_and_big_are_the_papers(name):
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    m, t = preset["model"], preset["train"]
    sizes = [m[key] for key in ("num_layers", "d_model", "d_ff", "num_heads", "d_k", "d_v", "dropout")]
    assert (*sizes, t["label_smoothing"], t["max_steps"], t["average_checkpoints"]) == PUBLISHED[name]
    assert (m["positions"], m["norm"]) == ("sinusoidal", "post")
    assert (t["beta1"], t["beta2"], t["eps"], t["warmup_steps"], t["lr_scale"]) == (0.9, 0.98, 1e-9, 4000, 1.0)
    assert (t["batch_tokens"], t["max_grad_norm"]) == (25_000, 0.0)
