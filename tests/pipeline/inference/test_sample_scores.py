"""Scores of a sample during training, which must not change the training."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.transformer import Transformer
from pipeline.common.settings import Settings
from pipeline.data.dataset import load_tokenizer
from pipeline.encode import encode_corpus
from pipeline.inference.metrics import chrf, sacre_bleu
from pipeline.inference.sample_scores import SampleScorer
from pipeline.inference.split import read_split
from pipeline.inference.translate import translate
from pipeline.train_tokenizer import train_tokenizer
from pipeline.training import checkpoint
from pipeline.training.trainer import train_rank
from tests.factories import settings as make_settings

VOCAB = 310
WHO, DOES = ("ein Mann", "eine Frau", "das Kind", "der Hund"), ("singt", "liest", "malt", "sieht das Haus", "geht")
PAIRS = [
    (f"{who} {does} {where}.".upper(), f"{who} {does} {where}.") for who in WHO for does in DOES for where in WHO
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after the tokenize stage."""
    root = tmp_path_factory.mktemp("project")
    clean = root / "data/clean"
    clean.mkdir(parents=True)
    for split, pairs in (("train", PAIRS), ("valid", PAIRS[::3]), ("test", PAIRS[:3])):
        for side, code in enumerate(("en", "de")):
            (clean / f"{split}.{code}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    train_tokenizer(clean / "train.en", clean / "train.de", root / "data/tokenizer", VOCAB)
    encode_corpus(clean, root / "data/tokenizer", root / "data/encoded", "en", "de")
    return root


def settings(bleu_sentences: int) -> Settings:
    own = make_settings(train={"bleu_sentences": bleu_sentences}, model={"max_length": 80})
    return replace(own, evaluate=replace(own.evaluate, beam=4, max_extra=5, engine="ctranslate2"))


def model(seed: int = 1) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(settings(1).model.config(VOCAB))


@pytest.mark.parametrize("number", [7, 1000])
def test_sample_scorer_scores_greedy_translations_of_the_sample(root, number):
    scorer, trained = SampleScorer(settings(number), root), model()
    valid = read_split("valid", "en", "de", root)
    chosen = sorted(np.random.default_rng(0).permutation(len(PAIRS[::3]))[:number].tolist())
    assert len(chosen) == min(number, 27)
    search = replace(settings(number).evaluate, beam=1, engine="torch")
    sources = [valid.tokens.src[i] for i in chosen]
    translations = translate(trained.eval(), load_tokenizer(root / "data/tokenizer"), sources, search, progress=False)
    outputs, references = [t.text for t in translations], [PAIRS[::3][i][1] for i in chosen]
    expected = {
        "valid_bleu": sacre_bleu(outputs, references, "de").value,
        "valid_chrf": chrf(outputs, references).value,
    }
    assert scorer(trained) == expected
    assert expected["valid_chrf"] > 0


def test_sample_scorer_leaves_random_state_and_mode_as_they_are(root):
    scorer, trained = SampleScorer(settings(9), root), model()
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    for training in (True, False):
        scorer(trained.train(training))
        assert trained.training == training
        assert all(module.training == training for module in trained.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())


def trained(root: Path, folder: Path, score: Callable[[Transformer], dict[str, float]] | None) -> dict:
    """Train, and return all results except times."""
    state = train_rank(
        settings(9), root / "data/encoded", folder, rank=0, num_ranks=1, device=torch.device("cpu"),
        report=lambda metrics, step: None, progress=lambda state, loss: None, log=lambda line: None, score=score,
    )  # fmt: skip
    content = asdict(state)
    del content["seconds"]
    for point in content["training_curve"]:
        del point["tokens_per_second"]
    tensors = load_file(checkpoint.folders(folder)[-1] / "tensors.safetensors")
    return {"state": content, "tensors": tensors}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_sample_scorer_changes_no_bit_of_training(root, tmp_path, own_threads, num_threads):
    torch.set_num_threads(num_threads)
    plain = trained(root, tmp_path / "plain", None)
    scored = trained(root, tmp_path / "scored", SampleScorer(settings(9), root))
    assert all(torch.equal(value, scored["tensors"][name]) for name, value in plain["tensors"].items())
    points = scored["state"]["validation_curve"]
    assert [point["step"] for point in points] == [4, 8, 9]
    for point in points:
        assert 0 <= point.pop("valid_bleu") <= 100
        assert 0 < point.pop("valid_chrf") <= 100
    assert scored["state"] == plain["state"]


def test_sample_scorer_names_the_text_that_is_missing(root, tmp_path):
    with pytest.raises(ValueError, match="run the tokenize stage first"):
        SampleScorer(settings(9), tmp_path)
