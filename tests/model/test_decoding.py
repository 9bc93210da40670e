import math
import random
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from model import decoding
from model.config import BOS, EOS, PAD, UNK, Positions
from model.decoding import Hypothesis, beam_search, length_penalty
from model.kv_cache import BeamKVCache
from model.transformer import Transformer
from tests.factories import build, config

A, B, C = 4, 5, 6
NextLogProbs = Callable[[int, tuple[int, ...]], list[float]]  # arguments: sentence, prefix
Output = tuple[float, float, tuple[int, ...]]  # score, log_prob, tokens


class RandomDecoder:
    """A random recurrent network. Each sentence has its own distribution, which depends on the whole prefix."""

    def __init__(self, seed: int, num_sentences: int, vocab: int, *, scale: float = 2.5, eos_bias: float = 0.0):
        generator = torch.Generator().manual_seed(seed)
        size = 7
        self.first = torch.randn(num_sentences, size, generator=generator)
        self.inputs = torch.randn(vocab, size, generator=generator)
        self.recurrent = torch.randn(size, size, generator=generator)
        self.output = scale * torch.randn(size, vocab, generator=generator) / size**0.5
        self.bias = torch.zeros(vocab)
        self.bias[EOS] = eos_bias
        self.state = self.first
        self.num_sentences = num_sentences
        self.num_steps = 0
        self.sentence_steps = 0  # sentences still in the batch, summed over the steps

    def step(self, tokens: Tensor) -> Tensor:
        self.num_steps += 1
        self.sentence_steps += self.num_sentences
        assert tokens.shape == self.state.shape[:1]
        self.state = torch.tanh(self.state @ self.recurrent + self.inputs[tokens])
        return self.state

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.output + self.bias

    def reorder(self, rows: Tensor) -> None:
        old_size = len(self.state) // self.num_sentences
        new_size = len(rows) // self.num_sentences
        assert torch.equal(rows // old_size, torch.arange(len(rows)) // new_size)  # rows stay within their sentence
        self.state = self.state[rows]

    def select_sentences(self, sentences: Tensor) -> None:
        assert 0 < len(sentences) < self.num_sentences
        self.state = self.state.view(self.num_sentences, -1, self.state.shape[1])[sentences].flatten(0, 1)
        self.num_sentences = len(sentences)

    def next_log_probs(self, sentence: int, prefix: tuple[int, ...]) -> list[float]:
        state = self.first[sentence]
        for token in (BOS, *prefix):
            state = torch.tanh(state @ self.recurrent + self.inputs[token])
        return (state @ self.output + self.bias).double().log_softmax(0).tolist()


class TableDecoder:
    """Probabilities given as {prefix: {next token: probability}}. Tokens that are not listed have none."""

    def __init__(self, table: dict[tuple[int, ...], dict[int, float]]):
        self.table = table
        self.prefixes: list[tuple[int, ...]] = [()]

    def step(self, tokens: Tensor) -> Tensor:
        self.prefixes = [(*prefix, token) for prefix, token in zip(self.prefixes, tokens.tolist(), strict=True)]
        logits = torch.full((len(self.prefixes), 7), -torch.inf)
        for row, prefix in enumerate(self.prefixes):
            for token, probability in self.table.get(prefix[1:], {EOS: 1.0}).items():
                logits[row, token] = math.log(probability)
        return logits

    def logits(self, x: Tensor) -> Tensor:
        return x

    def reorder(self, rows: Tensor) -> None:
        self.prefixes = [self.prefixes[row] for row in rows.tolist()]

    def select_sentences(self, sentences: Tensor) -> None:
        raise AssertionError("there is one sentence")


def penalty(length: int, alpha: float) -> float:
    return math.pow((5 + length) / 6, alpha)


def plain_search(
    next_log_probs: NextLogProbs, sentence: int, max_length: int, beam: int, alpha: float
) -> tuple[list[Output], list[Output], float]:
    """Beam search of one sentence in plain Python, which always runs to the maximum length.

    Returns all finished outputs, those that reached the maximum length, and the smallest difference
    of scores that decided between two candidates.
    """
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished = []
    margin = math.inf
    considered = 2 * beam if beam > 1 else 1
    for _ in range(max_length + 1):
        longest = live
        candidates = []
        for log_prob, tokens in live:
            for token, step in enumerate(next_log_probs(sentence, tokens)):
                if token not in (PAD, BOS):
                    candidates.append((log_prob + step, (*tokens, token)))
        candidates = sorted(candidates, reverse=True)
        margin = min(margin, least_gap(candidates, at=considered))
        for log_prob, tokens in candidates[:considered]:
            if tokens[-1] == EOS:
                finished.append((log_prob / penalty(len(tokens), alpha), log_prob, tokens[:-1]))
        living = [(log_prob, tokens) for log_prob, tokens in candidates[:considered] if tokens[-1] != EOS]
        margin = min(margin, least_gap(living, at=beam))
        live = living[:beam]
    finished.sort(reverse=True)
    unfinished = [(log_prob / penalty(max_length, alpha), log_prob, tokens) for log_prob, tokens in longest]
    for ranked in (finished, unfinished):
        margin = min([margin, *(least_gap(ranked, at) for at in range(1, len(ranked)))])
    return finished, unfinished, margin


def plain_greedy(next_log_probs: NextLogProbs, sentence: int, max_length: int) -> tuple[list[int], float, bool]:
    """Greedy search in plain Python. Returns the output, its log_prob, and whether it ended."""
    output: list[int] = []
    total = 0.0
    while True:
        log_probs = next_log_probs(sentence, tuple(output))
        log_probs[PAD] = log_probs[BOS] = -math.inf
        token = log_probs.index(max(log_probs))
        if token == EOS:
            return output, total + log_probs[EOS], True
        if len(output) == max_length:
            return output, total, False
        output.append(token)
        total += log_probs[token]


def least_gap(ranked: list[Any], at: int) -> float:
    """Return the score of candidate number `at` minus that of the next one."""
    return ranked[at - 1][0] - ranked[at][0] if at < len(ranked) else math.inf


def all_outputs(
    next_log_probs: NextLogProbs, sentence: int, max_length: int, tokens_left: list[int], alpha: float
) -> list[Output]:
    """Return (score, log_prob, tokens) of every possible output, best first."""
    found = []
    for length in range(max_length + 1):
        for tokens in product(tokens_left, repeat=length):
            steps = [next_log_probs(sentence, tokens[:i])[token] for i, token in enumerate((*tokens, EOS))]
            found.append((sum(steps) / penalty(length + 1, alpha), sum(steps), tokens))
    return sorted(found, reverse=True)


def assert_same(found: list[Hypothesis], expected: list[Output]) -> None:
    assert [tuple(h.tokens) for h in found] == [tokens for _, _, tokens in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _, _ in expected], abs=1e-4)
    assert [h.log_prob for h in found] == pytest.approx([log_prob for _, log_prob, _ in expected], abs=1e-4)


def test_length_penalty_is_the_gnmt_formula():
    assert float(length_penalty(1, 0.6)) == 1.0
    assert float(length_penalty(7, 1.0)) == 2.0
    assert float(length_penalty(19, 0.5)) == 2.0
    assert float(length_penalty(100, 0.0)) == 1.0


GARDEN_PATH: dict[tuple[int, ...], dict[int, float]] = {
    (): {A: 0.6, B: 0.4},
    (A,): {A: 0.5, B: 0.5},
    (A, A): {EOS: 0.5, C: 0.5},
    (A, B): {EOS: 0.5, C: 0.5},
    (B,): {EOS: 0.9, C: 0.1},
}


def test_beam_search_2_leaves_the_garden_path_that_beam_1_follows():
    [[greedy]] = beam_search(TableDecoder(GARDEN_PATH), torch.tensor([11]), beam=1, alpha=0)
    [[best, second]] = beam_search(TableDecoder(GARDEN_PATH), torch.tensor([11]), beam=2, alpha=0)
    assert greedy.tokens[0] == A
    assert greedy.log_prob == pytest.approx(math.log(0.6 * 0.5 * 0.5), abs=1e-6)
    assert best.tokens == [B]
    assert best.log_prob == pytest.approx(math.log(0.4 * 0.9), abs=1e-6)
    assert second.log_prob == pytest.approx(math.log(0.6 * 0.5 * 0.5), abs=1e-6)
    assert best.finished
    assert second.finished


def test_beam_search_prefers_longer_outputs_by_a_larger_alpha():
    table = {(): {EOS: 0.3, A: 0.7}, (A,): {A: 0.35, B: 0.65}, (A, B): {EOS: 0.6, C: 0.4}}
    by_alpha = {
        alpha: beam_search(TableDecoder(table), torch.tensor([11]), beam=3, alpha=alpha)[0][0] for alpha in (0.0, 1.0)
    }
    # Probabilities: [] 0.3, [A, B] 0.7 * 0.65 * 0.6 = 0.273; lp of the longer is (8 / 6)^alpha.
    assert by_alpha[0.0].tokens == []
    assert by_alpha[1.0].tokens == [A, B]
    assert by_alpha[1.0].score == pytest.approx(math.log(0.273) / (8 / 6), abs=1e-6)


@pytest.mark.parametrize("num_seeds", [15, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.3])
def test_beam_search_1_is_greedy_search_whatever_alpha(alpha: float, num_seeds: int):
    for seed in range(num_seeds):
        max_lengths = [13, 0, 5, 7, 1]
        decoder = RandomDecoder(seed, 5, 11)
        found = beam_search(decoder, torch.tensor(max_lengths), beam=1, alpha=alpha)
        for i, [best] in enumerate(found):
            tokens, log_prob, finished = plain_greedy(decoder.next_log_probs, i, max_lengths[i])
            assert (best.tokens, best.finished) == (tokens, finished)
            assert best.log_prob == pytest.approx(log_prob, abs=1e-5)
            assert best.score == pytest.approx(log_prob / penalty(len(tokens) + finished, alpha), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.9])
def test_beam_search_of_a_wide_beam_equals_exhaustive_search(alpha: float):
    tokens_left = [UNK, A, B]
    for seed in range(12):
        decoder = RandomDecoder(seed, 3, 6)
        found = beam_search(decoder, torch.tensor([4, 1, 3]), beam=240, alpha=alpha)
        for i, max_length in enumerate([4, 1, 3]):
            expected = all_outputs(decoder.next_log_probs, i, max_length, tokens_left, alpha)
            assert len(found[i]) == sum(3**n for n in range(max_length + 1))
            assert [h.score for h in found[i]] == pytest.approx([score for score, _, _ in expected], abs=1e-4)
            assert_same(found[i][:1], expected[:1])
            assert {tuple(h.tokens) for h in found[i]} == {tokens for _, _, tokens in expected}


@pytest.mark.parametrize("num_seeds", [20, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 3.1])
def test_beam_search_ends_early_with_what_a_full_search_gives(alpha: float, num_seeds: int):
    num_steps = num_most = 0
    for seed in range(num_seeds):
        beam = (2, 3, 5)[seed % 3]
        max_lengths = [11, 3, 0, 7]
        decoder = RandomDecoder(seed, 4, 7, eos_bias=seed % 4 - 1.0)
        found = beam_search(decoder, torch.tensor(max_lengths), beam=beam, alpha=alpha)
        for i, max_length in enumerate(max_lengths):
            expected, _, _ = plain_search(decoder.next_log_probs, i, max_length, beam, alpha)
            if expected:
                assert all(h.finished for h in found[i])
                assert_same(found[i], expected[:beam])
            else:
                assert not any(h.finished for h in found[i])
        num_steps += decoder.sentence_steps
        num_most += sum(length + 1 for length in max_lengths)
    assert num_steps < num_most * (0.98 if alpha < 2 else 1)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_beam_search_for_num_best_1_gives_the_same_best_sooner(alpha: float):
    steps = {1: 0, 4: 0}
    for seed in range(40):
        max_lengths = torch.tensor([19, 5, 11])
        found = {}
        for num_best in steps:
            decoder = RandomDecoder(seed, 3, 13, eos_bias=1.0)
            found[num_best] = beam_search(decoder, max_lengths, beam=4, alpha=alpha, num_best=num_best)
            steps[num_best] += decoder.sentence_steps
        for [best], best_four in zip(found[1], found[4], strict=True):
            assert best == best_four[0]
    assert steps[1] < 0.7 * steps[4]


def test_beam_search_reports_the_models_own_log_prob():
    for seed in range(20):
        decoder = RandomDecoder(seed, 5, 17)
        for i, hypotheses in enumerate(beam_search(decoder, torch.tensor([13, 2, 11, 3, 7]), beam=4, alpha=0.6)):
            assert len(hypotheses) > 0
            for h in hypotheses:
                output = (*h.tokens, EOS) if h.finished else tuple(h.tokens)
                steps = [decoder.next_log_probs(i, output[:n])[token] for n, token in enumerate(output)]
                assert h.log_prob == pytest.approx(sum(steps), abs=1e-4)
                assert h.score == pytest.approx(sum(steps) / penalty(len(output), 0.6), abs=1e-4)


def test_beam_search_hypotheses_differ_and_come_best_first():
    for seed in range(20):
        for hypotheses in beam_search(RandomDecoder(seed, 3, 17), torch.tensor([13, 5, 7]), beam=5, alpha=0.6):
            scores = [h.score for h in hypotheses]
            assert scores == sorted(scores, reverse=True)
            assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)


def test_beam_search_does_not_depend_on_other_sentences_in_the_batch():
    max_lengths = torch.tensor([13, 2, 11, 0, 7, 17, 3])
    for seed in range(20):
        together = beam_search(RandomDecoder(seed, 7, 19), max_lengths, beam=3, alpha=0.6)
        for i in range(7):
            decoder = RandomDecoder(seed, 7, 19)
            decoder.select_sentences(torch.tensor([i]))
            [alone] = beam_search(decoder, max_lengths[i : i + 1], beam=3, alpha=0.6)
            assert [h.tokens for h in alone] == [h.tokens for h in together[i]]
            assert [h.log_prob for h in alone] == pytest.approx([h.log_prob for h in together[i]], abs=1e-4)


@pytest.mark.parametrize("beam", [1, 3])
def test_beam_search_outputs_are_at_most_as_long_as_their_own_max_length(beam: int):
    max_lengths = [5, 0, 13, 2]
    for seed in range(20):
        found = beam_search(RandomDecoder(seed, 4, 11), torch.tensor(max_lengths), beam=beam, alpha=0.6)
        for hypotheses, max_length in zip(found, max_lengths, strict=True):
            for h in hypotheses:
                assert len(h.tokens) <= max_length
                assert h.finished or len(h.tokens) == max_length
                assert not {PAD, BOS, EOS} & set(h.tokens)


@pytest.mark.parametrize("beam", [1, 4])
def test_beam_search_cuts_off_outputs_that_never_end_and_marks_them(beam: int):
    max_lengths = [7, 0, 3]
    decoder = RandomDecoder(5, 3, 11, eos_bias=-1e4)
    found = beam_search(decoder, torch.tensor(max_lengths), beam=beam, alpha=0.6)
    assert decoder.num_steps == 8
    for i, (hypotheses, max_length) in enumerate(zip(found, max_lengths, strict=True)):
        assert len(hypotheses) == (beam if max_length else 1)
        for h in hypotheses:
            assert (len(h.tokens), h.finished) == (max_length, False)
            steps = [decoder.next_log_probs(i, tuple(h.tokens[:n]))[t] for n, t in enumerate(h.tokens)]
            assert h.log_prob == pytest.approx(sum(steps), abs=1e-4)
            assert h.score == pytest.approx(h.log_prob / penalty(max_length, 0.6), abs=1e-4)


def test_beam_search_gives_at_most_num_best_unfinished_outputs():
    found = beam_search(RandomDecoder(5, 2, 11, eos_bias=-1e4), torch.tensor([7, 3]), beam=4, alpha=0.6, num_best=2)
    assert [len(hypotheses) for hypotheses in found] == [2, 2]


def test_beam_search_gives_unfinished_outputs_only_where_none_finished():
    table = {(): {A: 0.99, EOS: 0.01}, (A,): {B: 1.0}, (A, B): {C: 1.0}}
    [[best]] = beam_search(TableDecoder(table), torch.tensor([2]), beam=2, alpha=0.6)[:1]
    assert (best.tokens, best.finished) == ([], True)


@pytest.mark.parametrize("beam", [1, 3])
def test_beam_search_never_chooses_pad_or_bos_however_probable(beam: int):
    for seed in range(10):
        decoder = RandomDecoder(seed, 3, 11)
        decoder.bias[PAD] = decoder.bias[BOS] = 20.0
        for hypotheses in beam_search(decoder, torch.tensor([7, 5, 3]), beam=beam, alpha=0.6):
            assert hypotheses
            assert not any({PAD, BOS} & set(h.tokens) for h in hypotheses)


def test_beam_search_of_an_empty_batch_gives_no_results():
    nobody = torch.zeros(0, dtype=torch.int64)
    assert beam_search(RandomDecoder(1, 0, 11), nobody, beam=3, alpha=0.6) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0, "alpha": 0.6}, "beam must be >= 1, got 0"),
        ({"beam": 4, "alpha": -0.5}, "alpha must be >= 0, got -0.5"),
        ({"beam": 4, "alpha": 0.6, "num_best": 0}, "num_best must be >= 1, got 0"),
    ],
)
def test_beam_search_names_an_impossible_option(options: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        beam_search(RandomDecoder(1, 2, 11), torch.tensor([3, 5]), **options)


def test_beam_search_names_a_negative_maximum_length():
    with pytest.raises(ValueError, match=r"^max_lengths must be >= 0, got -2$"):
        beam_search(RandomDecoder(1, 2, 11), torch.tensor([3, -2]), beam=3, alpha=0.6)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_beam_search_refuses_logits_that_contain_nan_or_inf(value: float, beam: int):
    decoder = RandomDecoder(1, 2, 11)
    decoder.bias[A] = value
    with pytest.raises(ValueError, match=r"^the decoder's logits contain NaN or \+inf$"):
        beam_search(decoder, torch.tensor([3, 5]), beam=beam, alpha=0.6)


@pytest.mark.parametrize("vocab", [5, 63, 64, 67, 128, 331, 1009])
@pytest.mark.parametrize("levels", [0, 3])
def test_continue_finds_the_continuations_of_a_full_sort(vocab: int, levels: int, monkeypatch):
    monkeypatch.setattr(decoding, "HYPOTHESES_PER_CHUNK", 11)
    decoder = RandomDecoder(vocab, 1, 11)
    most_rows = 0

    def logits(x: Tensor) -> Tensor:
        nonlocal most_rows
        most_rows = max(most_rows, len(x))
        return x.clone()

    monkeypatch.setattr(decoder, "logits", logits)
    for num_sentences, num_live, most in product((1, 13), (1, 3, 7), (1, 2, 9, 2000)):
        x = torch.randn(num_sentences * num_live, vocab)
        if levels:  # many ties
            x = x.mul(levels).round()
        log_prob = torch.randn(num_sentences, num_live)
        log_prob[0, 1:] = -torch.inf
        found, parent, token = decoding._continue(decoder, x, log_prob, most)
        every = log_prob[:, :, None] + x.log_softmax(1).view(num_sentences, num_live, vocab)
        every[:, :, [PAD, BOS]] = -torch.inf
        expected = every.flatten(1).sort(dim=1, descending=True).values[:, :most]
        torch.testing.assert_close(found, expected)
        rows = torch.arange(num_sentences)[:, None]
        torch.testing.assert_close(every[rows, parent, token], found)
        assert all(len(set(line)) == len(line) for line in (parent * vocab + token).tolist())
    assert most_rows == 11


def random_transformer(seed: int, positions: Positions) -> Transformer:
    """A model of random sizes whose distributions are sharp enough that its outputs end and differ."""
    draw = random.Random(seed)
    sizes = config(
        vocab_size=draw.randint(9, 150), num_layers=draw.randint(1, 2), d_model=2 * draw.randint(3, 9),
        d_ff=draw.randint(5, 23), num_heads=draw.randint(1, 4), d_k=2 * draw.randint(1, 4), d_v=draw.randint(1, 7),
        dropout=0.0, positions=positions, norm=draw.choice(["pre", "post"]), max_length=13,
    )  # fmt: skip
    model = build(sizes, seed)
    with torch.no_grad():
        model.embedding.weight *= 1.7
    return model


@pytest.mark.parametrize("num_seeds", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_beam_search_of_a_transformer_is_the_plain_search(num_seeds: int):
    """The plain search computes every prefix from its start, for one sentence alone. The outputs may differ where
    the plain search decided by a difference that is within rounding."""
    near_ties, ends, total = 0, set(), 0
    for seed, positions in product(range(num_seeds), get_args(Positions)):
        model = random_transformer(seed, positions)
        beam, alpha, num_best = (1, 2, 3, 4, 5)[seed % 5], (0.0, 0.6, 1.3)[seed % 3], 1 + seed % 4
        lengths, limits = [5, 2, 0, 4, 3], torch.randint(0, 12, (5,))
        src = torch.randint(4, model.config.vocab_size, (5, 6))
        for sentence, length in zip(src, lengths, strict=True):
            sentence[length], sentence[length + 1 :] = EOS, PAD

        @torch.inference_mode()
        def next_log_probs(i: int, prefix: tuple[int, ...]) -> list[float]:
            x = model(src[i : i + 1, : lengths[i] + 1], torch.tensor([[BOS, *prefix]]))  # noqa: B023
            return model.logits(x[0, -1]).double().log_softmax(0).tolist()  # noqa: B023

        with torch.inference_mode():
            state = BeamKVCache(model, src)
        for i, hypotheses in enumerate(beam_search(state, limits, beam=beam, alpha=alpha, num_best=num_best)):
            finished, unfinished, margin = plain_search(next_log_probs, i, int(limits[i]), beam, alpha)
            total += 1
            if margin < 1e-5:
                near_ties += 1
            else:
                assert_same(hypotheses, (finished or unfinished)[:num_best])
                assert {h.finished for h in hypotheses} == {bool(finished)}
                ends.add((bool(finished), len(hypotheses)))
    assert near_ties < 0.01 * total
    assert {(True, 1), (False, 1), (True, 3), (False, 3)} <= ends


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("positions", ["sinusoidal", "relative", "rotary"])
def test_beam_search_reports_the_transformers_own_score(positions: Positions, device: str):
    """Compares with the log-probabilities of the transformer in double precision."""
    sizes = config(d_model=14, d_k=6, d_v=5, positions=positions, max_length=12)
    num_finished = []
    for seed in (7, 11, 13):
        model = build(sizes, seed)
        src = torch.randint(4, 23, (5, 7))
        for sentence, length in zip(src, (6, 2, 4, 0, 5), strict=True):
            sentence[length], sentence[length + 1 :] = EOS, PAD
        limits = torch.tensor([11, 5, 7, 3, 2], device=device)
        found = beam_search(BeamKVCache(model.to(device), src.to(device)), limits, beam=4, alpha=0.6)
        model.cpu().double()
        for i, h in ((i, h) for i, hypotheses in enumerate(found) for h in hypotheses):
            tgt = torch.tensor([[BOS, *h.tokens, EOS]])
            with torch.inference_mode():
                log_probs = model.logits(model(src[i : i + 1], tgt[:, :-1])).log_softmax(-1)
            steps = log_probs.gather(2, tgt[:, 1:, None]).flatten()
            assert h.log_prob == pytest.approx(float(steps[: len(h.tokens) + h.finished].sum()), abs=1e-4)
            num_finished.append(h.finished)
    assert len(set(num_finished)) == 2  # some are finished, some are not
