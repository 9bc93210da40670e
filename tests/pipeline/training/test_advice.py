"""Advice if a corpus and a model do not fit each other, and none if they do."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.transformer import Transformer
from pipeline.common.presets import preset_files
from pipeline.common.settings import load_settings
from pipeline.data.dataset import SIDES, encoded_paths
from pipeline.training.advice import best_validation, overfitting_advice, size_advice
from tests.factories import REPOSITORY


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], Path]:
    """Return a function that writes an encoded corpus of these sizes, without content."""

    def write(pairs: int, length: int, vocab_size: int) -> Path:
        for side in SIDES:
            ids, offsets = encoded_paths(tmp_path, "train", side)
            np.lib.format.open_memmap(ids, "w+", np.uint16, (pairs * length,))  # a sparse file
            np.lib.format.open_memmap(offsets, "w+", np.int64, (pairs + 1,))[-1] = pairs * length
        counts = {split: {"src": 1, "tgt": 1} for split in ("train", "valid", "test")}
        info = {
            "src": "en",
            "tgt": "de",
            "vocab_size": vocab_size,
            "pairs": {},
            "words": counts,
            "texts": {},
            "sha256": "",
        }
        (tmp_path / "meta.json").write_text(json.dumps(info))
        monkeypatch.setattr("pipeline.data.dataset.verify", lambda *arguments: None)
        return tmp_path

    return write


# pairs, tokens per sentence and vocabulary of the presets' corpora
MEANT_FOR = {
    "mini": (24_000, 17, 2_000),  # grammar
    "tiny": (29_000, 14, 10_000),  # Multi30k
    "base": (4_500_000, 28, 37_000),  # WMT 2014
    "big": (4_500_000, 28, 37_000),
}


def test_size_advice_is_silent_for_each_preset_on_the_corpus_that_it_is_meant_for(corpus):
    assert set(MEANT_FOR) == set(preset_files(REPOSITORY, "model"))
    for name, size in MEANT_FOR.items():
        assert size_advice(corpus(*size), load_settings(REPOSITORY, model=name).model) == [], name


def test_size_advice_of_a_small_own_corpus_names_vocabulary_and_model(corpus):
    tiny = load_settings(REPOSITORY, model="tiny").model
    vocabulary, parameters = size_advice(corpus(2_600, 20, 8_000), tiny)
    assert vocabulary == (
        "a vocabulary of 8,000 is large for 2,600 pairs: a token occurs 13 times on average; "
        "try tokenize.vocab_size 1000"
    )
    number = sum(p.numel() for p in Transformer(tiny.config(8_000)).parameters())
    assert parameters.startswith(
        f"{number:,} parameters are many for 2,600 pairs ({number / 52_000:.0f} per target token): "
    )


def test_size_advice_that_is_followed_is_not_repeated(corpus):
    mini = load_settings(REPOSITORY, model="mini").model
    for pairs in (3_000, 10_000, 100_000, 1_000_000):
        vocab_size = 20_000 if pairs < 100_000 else 200_000
        for line in size_advice(corpus(pairs, 20, vocab_size), mini):
            if found := re.search(r"try tokenize\.vocab_size (\d+)$", line):
                assert not [
                    line for line in size_advice(corpus(pairs, 20, int(found[1])), mini) if "vocabulary of" in line
                ]


@pytest.mark.parametrize(("vocab_size", "advises"), [(1333, False), (1334, True)])
def test_size_advice_begins_where_a_token_occurs_less_than_30_times(corpus, vocab_size, advises):
    lines = size_advice(corpus(1_000, 20, vocab_size), load_settings(REPOSITORY, model="mini").model)
    assert any("vocabulary of" in line for line in lines) == advises


def test_size_advice_begins_beyond_20_parameters_for_each_target_token(corpus):
    mini = load_settings(REPOSITORY, model="mini").model
    number = sum(p.numel() for p in Transformer(mini.config(500)).parameters())
    pairs = -(-number // 20 // 20)
    assert size_advice(corpus(pairs, 20, 500), mini) == []
    (line,) = size_advice(corpus(pairs - 1, 20, 500), mini)
    assert "parameters are many" in line


def test_size_advice_takes_no_memory(corpus, monkeypatch):
    devices = []
    sizes = load_settings(REPOSITORY, model="big").model
    init = Transformer.__init__

    def watched(self, config):
        init(self, config)
        devices.extend(p.device for p in self.parameters())

    monkeypatch.setattr(Transformer, "__init__", watched)
    size_advice(corpus(10, 20, 500), sizes)
    assert set(devices) == {torch.device("meta")}


def curve(*points: tuple[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "valid_loss": loss, "valid_ppl": float(np.exp(loss))} for step, loss in points]


def test_overfitting_advice_names_steps_perplexities_and_the_ways_out():
    assert overfitting_advice(curve((200, 7.0), (600, 5.9610), (4000, 6.2519))) == (
        "the best validation loss was at step 600 of 4,000 (perplexity 388 there, 519 at the end): the model "
        "overfits; lower train.max_steps, set train.patience, raise model.dropout, or use a smaller model or "
        "tokenize.vocab_size"
    )


def test_overfitting_advice_has_bleu_if_it_was_measured():
    points = curve((600, 2.0), (4000, 2.3))
    for point, bleu in zip(points, (12.34, 11.0), strict=True):
        point["valid_bleu"] = bleu
    assert "(perplexity 7.39 there, 9.97 at the end; sample BLEU 12.3 and 11.0)" in overfitting_advice(points)  # type: ignore[operator]


@pytest.mark.parametrize(
    "points",
    [
        [(100, 3.0)],
        [(100, 3.0), (200, 2.0)],
        [(100, 2.0), (600, 1.97), (1000, 2.01)],  # not much worse: noise
        [(100, 3.0), (900, 2.0), (1000, 2.3)],  # not much earlier
    ],
    ids=["one", "falling", "level", "just now"],
)
def test_overfitting_advice_is_none_for_a_usual_run(points):
    assert overfitting_advice(curve(*points)) is None


def test_best_validation_is_the_first_of_equals():
    assert best_validation(curve((1, 3.0), (2, 2.0), (3, 2.0), (4, 2.5)))["step"] == 2
