import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import torch

from model.config import BOS, EOS, PAD, UNK, TransformerConfig
from model.decoding import beam_search
from model.kv_cache import BeamKVCache
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.inference.translate import translate

MAX_LENGTH = 13
SETTINGS = Evaluate(beam=3, alpha=0.6, max_extra=2, engine="torch", batch_tokens=29, num_samples=1)


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ein Mann singt im Haus", "eine Frau liest das Buch", "das Kind malt"]),
        model_writer=model, model_type="bpe", vocab_size=41, minloglevel=2,
        pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(11)
    config = TransformerConfig(
        vocab_size=41, num_layers=2, d_model=14, d_ff=17, num_heads=3, d_k=6, d_v=5, dropout=0.0,
        positions="sinusoidal", norm="post", max_length=MAX_LENGTH,
    )  # fmt: skip
    return Transformer(config).eval()


@pytest.fixture(scope="module")
def sources() -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(4, 41, length).astype(np.uint16) for length in (5, 0, 11, 3, 7, 2, 5, 12, 1)]


def with_(**changes: float) -> Evaluate:
    return Evaluate(**{**vars(SETTINGS), **changes})


def test_translate_gives_each_sentence_its_own_best_output(model, tokenizer, sources):
    found = translate(model, tokenizer, sources, SETTINGS, progress=False)
    assert len(found) == len(sources)
    for source, translation in zip(sources, found, strict=True):
        src = torch.tensor([[*source.tolist(), EOS]])
        limit = torch.tensor([min(len(source) + 2, MAX_LENGTH - 1)])
        with torch.inference_mode():
            [[best]] = beam_search(BeamKVCache(model, src), limit, beam=3, alpha=0.6, num_best=1)
        assert translation.text == " ".join(tokenizer.decode(best.tokens).split())
        assert translation.score == pytest.approx(best.score, abs=1e-4)
        assert translation.finished == best.finished


@pytest.mark.parametrize("batch_tokens", [1, 17, 10_000])
def test_translate_does_not_depend_on_the_size_of_batches(model, tokenizer, sources, batch_tokens: int):
    expected = translate(model, tokenizer, sources, SETTINGS, progress=False)
    found = translate(model, tokenizer, sources, with_(batch_tokens=batch_tokens), progress=False)
    assert [best.text for best in found] == [best.text for best in expected]
    assert [best.score for best in found] == pytest.approx([best.score for best in expected], abs=1e-4)


@pytest.fixture
def three_threads(own_threads: None) -> None:
    torch.set_num_threads(3)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_torch_engine_gives_threads_shares_of_batch_tokens(model, tokenizer, sources, three_threads, monkeypatch):
    expected = translate(model, tokenizer, sources, with_(batch_tokens=1), progress=False)
    seen = []

    def spy(decoder, max_lengths, **options):
        seen.append((torch.get_num_threads(), threading.get_ident(), decoder.attend_mask.numel()))
        time.sleep(0.05)
        return beam_search(decoder, max_lengths, **options)

    monkeypatch.setattr("pipeline.inference.torch_engine.beam_search", spy)
    found = translate(model, tokenizer, sources, with_(batch_tokens=39), progress=False)
    assert [best.text for best in found] == [best.text for best in expected]
    threads, workers, positions = zip(*seen, strict=True)
    assert set(threads) == {1}
    assert len(set(workers)) == 3
    assert max(positions) <= 39 // 3
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_translate_ends_with_the_error_of_a_search(model, tokenizer, sources, three_threads, monkeypatch):
    called = []

    def fail(*arguments, **options):
        called.append(1)
        raise ValueError("the decoder's logits contain NaN or +inf")

    monkeypatch.setattr("pipeline.inference.torch_engine.beam_search", fail)
    with pytest.raises(ValueError, match=r"^the decoder's logits contain NaN or \+inf$"):
        translate(model, tokenizer, sources * 50, with_(batch_tokens=1), progress=False)
    assert len(called) < 450
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_translate_limits_outputs_to_max_extra_tokens_more_than_the_source(model, tokenizer, sources, monkeypatch):
    limits = []

    def spy(decoder, max_lengths, **options):
        limits.extend(max_lengths.tolist())
        return beam_search(decoder, max_lengths, **options)

    monkeypatch.setattr("pipeline.inference.torch_engine.beam_search", spy)
    translate(model, tokenizer, sources, with_(max_extra=5), progress=False)
    assert sorted(limits) == sorted(min(len(source) + 5, MAX_LENGTH - 1) for source in sources)


def test_translate_cuts_a_source_longer_than_the_model_takes(model, tokenizer):
    long = np.random.default_rng(3).integers(4, 41, 31)
    found = translate(model, tokenizer, [long, long[: MAX_LENGTH - 1]], SETTINGS, progress=False)
    assert found[0].text == found[1].text


def test_translate_of_no_sentences_is_empty(model, tokenizer):
    assert translate(model, tokenizer, [], SETTINGS, progress=False) == []


def test_translate_puts_each_translation_on_one_line(model, tokenizer, sources):
    class Breaking:
        def decode(self, tokens: list[int]) -> str:
            return "ein \n Mann\tsingt "

    found = translate(model, Breaking(), sources[:2], SETTINGS, progress=False)
    assert found[0].text == "ein Mann singt"


def test_translate_counts_progress_in_sentences(model, tokenizer, sources, capsys):
    translate(model, tokenizer, sources, SETTINGS)
    assert "translating: 100%" in capsys.readouterr().err
    translate(model, tokenizer, sources, SETTINGS, progress=False)
    assert capsys.readouterr().err == ""
