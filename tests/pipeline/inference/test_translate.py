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
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.inference.translate import batches_by_length, translate

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


def test_each_sentence_gets_its_own_best_output(model, tokenizer, sources):
    found = translate(model, tokenizer, sources, SETTINGS, progress=False)
    assert len(found) == len(sources)
    for source, translation in zip(sources, found, strict=True):
        src = torch.tensor([[*source.tolist(), EOS]])
        limit = torch.tensor([min(len(source) + 2, MAX_LENGTH - 1)])
        with torch.inference_mode():
            [[best]] = beam_search(model.start(src), limit, beam=3, alpha=0.6, num_best=1)
        assert translation.text == " ".join(tokenizer.decode(best.tokens).split())
        assert translation.score == pytest.approx(best.score, abs=1e-4)
        assert translation.finished == best.finished


@pytest.mark.parametrize("batch_tokens", [1, 17, 10_000])
def test_the_size_of_the_batches_changes_no_translation(model, tokenizer, sources, batch_tokens: int):
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


def test_each_thread_searches_alone_in_its_share_of_the_batch(model, tokenizer, sources, three_threads, monkeypatch):
    expected = translate(model, tokenizer, sources, with_(batch_tokens=1), progress=False)
    seen = []

    def spy(decoder, max_lengths, **options):
        seen.append((torch.get_num_threads(), threading.get_ident(), decoder.attend_mask.numel()))
        time.sleep(0.05)
        return beam_search(decoder, max_lengths, **options)

    monkeypatch.setattr("pipeline.inference.translate.beam_search", spy)
    found = translate(model, tokenizer, sources, with_(batch_tokens=39), progress=False)
    assert [best.text for best in found] == [best.text for best in expected]
    threads, workers, positions = zip(*seen, strict=True)
    assert set(threads) == {1}
    assert len(set(workers)) == 3
    assert max(positions) <= 39 // 3
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_an_error_of_a_search_ends_the_translation(model, tokenizer, sources, three_threads, monkeypatch):
    called = []

    def fail(*arguments, **options):
        called.append(1)
        raise ValueError("the decoder's logits are not finite numbers")

    monkeypatch.setattr("pipeline.inference.translate.beam_search", fail)
    with pytest.raises(ValueError, match=r"^the decoder's logits are not finite numbers$"):
        translate(model, tokenizer, sources * 50, with_(batch_tokens=1), progress=False)
    assert len(called) < 450
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def test_an_output_has_at_most_max_extra_pieces_more_than_its_source(model, tokenizer, sources, monkeypatch):
    limits = []

    def spy(decoder, max_lengths, **options):
        limits.extend(max_lengths.tolist())
        return beam_search(decoder, max_lengths, **options)

    monkeypatch.setattr("pipeline.inference.translate.beam_search", spy)
    translate(model, tokenizer, sources, with_(max_extra=5), progress=False)
    assert sorted(limits) == sorted(min(len(source) + 5, MAX_LENGTH - 1) for source in sources)


def test_a_source_longer_than_the_model_takes_is_cut(model, tokenizer):
    long = np.random.default_rng(3).integers(4, 41, 31)
    found = translate(model, tokenizer, [long, long[: MAX_LENGTH - 1]], SETTINGS, progress=False)
    assert found[0].text == found[1].text


def test_no_sentences_give_no_translations(model, tokenizer):
    assert translate(model, tokenizer, [], SETTINGS, progress=False) == []


def test_a_translation_is_one_line(model, tokenizer, sources):
    class Breaking:
        def decode(self, tokens: list[int]) -> str:
            return "ein \n Mann\tsingt "

    found = translate(model, Breaking(), sources[:2], SETTINGS, progress=False)
    assert found[0].text == "ein Mann singt"


def test_progress_is_counted_in_sentences(model, tokenizer, sources, capsys):
    translate(model, tokenizer, sources, SETTINGS)
    assert "translating: 100%" in capsys.readouterr().err
    translate(model, tokenizer, sources, SETTINGS, progress=False)
    assert capsys.readouterr().err == ""


def test_batches_hold_every_sentence_once_longest_first_within_the_budget():
    lengths = np.random.default_rng(5).integers(0, 37, 203)
    batches = list(batches_by_length(lengths, 101, 0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(203))
    assert all(len(indices) * (lengths[indices].max() + 1) <= 101 for indices in batches)
    longest = [lengths[indices].max() for indices in batches]
    assert longest == sorted(longest, reverse=True)
    padded = sum(len(indices) * (lengths[indices].max() + 1) for indices in batches)
    assert padded < 1.1 * (lengths + 1).sum()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_workers_get_equal_shares(num_workers: int):
    random = np.random.default_rng(num_workers)
    for num_sentences in (203, 1000, 3000):
        lengths = random.integers(0, 37, num_sentences)
        batches = list(batches_by_length(lengths, 1001, 0, num_workers))
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_sentences))
        padded = [len(indices) * (int(lengths[indices].max()) + 1) for indices in batches]
        assert max(padded) <= 1001
        rounds = -(-len(batches) // num_workers)
        assert sum(padded) > 0.95 * max(padded) * num_workers * rounds
        fewest = len(list(batches_by_length(lengths, 1001, 0)))
        assert (rounds - 1) * num_workers < fewest  # no round more than needed


@pytest.mark.parametrize("max_extra", [3, 7, 50])
def test_short_sentences_have_room_for_longer_outputs(max_extra: int):
    for longest in (1, 5, 60):
        lengths = np.random.default_rng(longest).integers(0, longest + 1, 2000)
        batches = list(batches_by_length(lengths, 1000, max_extra))
        assert sorted(np.concatenate(batches).tolist()) == list(range(2000))
        assert max(len(indices) * (lengths[indices].max() + 1) for indices in batches) <= 1000
        positions = [int((lengths[indices] + max_extra + 1).sum()) for indices in batches]
        assert max(positions) <= 5 * 1000
        assert longest > 1 or max(positions) > 2 * 1000  # no smaller than they have to be


def test_few_sentences_are_shared_out_though_one_batch_has_room_for_them():
    assert [batch.tolist() for batch in batches_by_length(np.array([7, 7, 7, 7]), 100, 0, 2)] == [[0, 1], [2, 3]]
    assert [batch.tolist() for batch in batches_by_length(np.array([7]), 100, 0, 2)] == [[0]]
    assert list(batches_by_length(np.array([], dtype=np.int64), 100, 0, 2)) == []


def test_too_few_sentences_are_not_shared_out():
    lengths = np.array([7, 7, 7, 7])
    for least_tokens, expected in ((16, [[0, 1], [2, 3]]), (17, [[0, 1, 2, 3]])):
        assert [batch.tolist() for batch in batches_by_length(lengths, 100, 0, 2, least_tokens)] == expected
    # but no batch is larger than it may be
    assert [batch.tolist() for batch in batches_by_length(lengths, 16, 0, 2, 100)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_sentence_longer_than_the_budget_stands_alone(num_workers: int):
    lengths = np.array([3, 50, 2])
    assert [batch.tolist() for batch in batches_by_length(lengths, 10, 0, num_workers)] == [[1], [0, 2]]
    assert [batch.tolist() for batch in batches_by_length(lengths, 1, 0, num_workers)] == [[1], [0], [2]]
