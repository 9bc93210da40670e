"""CTranslate2's search compared with ours, and both with a plain search that follows the rules of either."""

import math
import random
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest
import torch

from model.config import BOS, EOS, PAD, UNK, Positions
from model.decoding import Hypothesis
from model.kv_cache import BeamKVCache
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.inference.ctranslate2_engine import SEARCH_PATIENCE, CTranslate2Engine
from pipeline.inference.translate import translate
from tests.support.random_models import MAX_LENGTH, VOCAB, random_model, random_tokenizer

TOKENIZER = random_tokenizer()
LONGEST = MAX_LENGTH - 1
SETTINGS = Evaluate(beam=4, alpha=0.6, max_extra=9, engine="ctranslate2", batch_tokens=67, num_samples=0)


def random_sources(count: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, LONGEST, count)
    return [generator.choice([UNK, *range(4, VOCAB)], length).astype(np.uint16) for length in lengths]


@dataclass(frozen=True)
class Rules:
    """The rules by which CTranslate2's search differs from ours."""

    ends_among: float  # an output may end only among the best `ends_among * beam` continuations of a step
    enough: float  # the search ends after `enough * beam` finished outputs
    share_of_pad_and_bos: bool  # whether PAD and BOS are in the softmax


OURS, THEIRS = Rules(2, math.inf, True), Rules(1, SEARCH_PATIENCE, False)


@torch.inference_mode()
def plain_search(
    model: Transformer, source: list[int], limit: int, beam: int, alpha: float, rules: Rules
) -> Hypothesis:
    decoder = BeamKVCache(model, torch.tensor([[*source, EOS]]))
    considered, enough = (1, 1.0) if beam == 1 else (2 * beam, rules.enough * beam)
    live, ended = [Hypothesis([], 0.0, 0.0, False)], []
    last = torch.tensor([BOS])
    for length in range(limit + 1):
        logits = decoder.logits(decoder.step(last))
        never = torch.zeros(VOCAB).index_fill(0, torch.tensor([PAD, BOS]), -math.inf)
        log_probs = logits.log_softmax(-1) + never if rules.share_of_pad_and_bos else (logits + never).log_softmax(-1)
        total = log_probs + torch.tensor([hypothesis.log_prob for hypothesis in live])[:, None]
        values, indices = total.flatten().topk(considered)
        parents, tokens = indices // VOCAB, indices % VOCAB
        continued = []
        for rank, (log_prob, parent, token) in enumerate(
            zip(values.tolist(), parents.tolist(), tokens.tolist(), strict=True)
        ):
            finished = token == EOS
            output = live[parent].tokens + [token] * (not finished)
            score = log_prob / ((5 + len(output) + finished) / 6) ** alpha
            hypothesis = Hypothesis(output, log_prob, score, finished)
            if rank < rules.ends_among * beam and (finished or length == limit):
                ended.append(hypothesis)
            if not finished:
                continued.append((hypothesis, parent))
        if len(ended) >= enough or length == limit or not continued:
            break
        live = [hypothesis for hypothesis, _ in continued[:beam]]
        last = torch.tensor([hypothesis.tokens[-1] for hypothesis in live])
        decoder.reorder(torch.tensor([parent for _, parent in continued[:beam]]))
    if enough < math.inf:  # the best `enough` by CTranslate2's score, where EOS counts as a token
        ended.sort(key=lambda h: -h.log_prob / (len(h.tokens) + h.finished) ** alpha)
        ended = ended[: int(enough)]
    finished_ones = [hypothesis for hypothesis in ended if hypothesis.finished]
    return max(finished_ones, key=lambda h: h.score) if finished_ones else live[0]


def spelled(hypothesis: Hypothesis) -> tuple[str, bool]:
    return " ".join(TOKENIZER.decode(hypothesis.tokens).split()), hypothesis.finished


def test_ctranslate2_searches_as_torch_does_but_for_three_rules():
    """Random models are rarely certain: 99 of 126 translations are equal, the others differ by these rules."""
    same = total = 0
    for seed, positions in enumerate(get_args(Positions) * 3):
        draw = random.Random(seed)
        beam, alpha, extra = draw.choice([1, 2, 5]), draw.choice([0, 0.6, 1.0]), draw.choice([0, 3, 29])
        settings = replace(SETTINGS, beam=beam, alpha=alpha, max_extra=extra)
        model, sources = random_model(seed, positions), random_sources(7, seed)
        ours = translate(model, TOKENIZER, sources, replace(settings, engine="torch"), progress=False)
        theirs = translate(model, TOKENIZER, sources, settings, progress=False)
        for source, our, their in zip(sources, ours, theirs, strict=True):
            for rules, translation in ((OURS, our), (THEIRS, their)):
                limit = min(len(source) + extra, LONGEST)
                expected = plain_search(model, source.tolist(), limit, beam, alpha, rules)
                assert (translation.text, translation.finished) == spelled(expected)
                assert translation.score == pytest.approx(expected.score, abs=1e-3)
            same += (our.text, our.finished) == (their.text, their.finished)
            total += 1
    assert total == 126
    assert same >= 99 - 3  # measured on an Intel Xeon; another processor may round a tie differently


def test_ctranslate2_translations_do_not_depend_on_batches_or_threads(own_threads):
    model, sources = random_model(1, "learned"), random_sources(40, seed=1)
    expected = [translate(model, TOKENIZER, [source], SETTINGS, progress=False)[0] for source in sources]
    assert len({translation.text for translation in expected}) > 10
    for batch_tokens, threads in ((1, 3), (97, 2), (10_000, 1)):
        torch.set_num_threads(threads)
        settings = replace(SETTINGS, batch_tokens=batch_tokens)
        found = translate(model, TOKENIZER, sources, settings, progress=False)
        assert [best.text for best in found] == [best.text for best in expected]
        assert [best.score for best in found] == pytest.approx([best.score for best in expected], abs=1e-4)


def test_ctranslate2_translates_empty_and_cut_sources_as_torch_does():
    model = random_model(1, "learned")
    long = np.arange(4, 4 + LONGEST + 5)
    sources = [[], long, long[:LONGEST], []]
    one_by_one = replace(SETTINGS, batch_tokens=1)  # on some processors, rounding depends on the batch
    found = translate(model, TOKENIZER, sources, one_by_one, progress=False)
    ours = translate(model, TOKENIZER, sources, replace(SETTINGS, engine="torch"), progress=False)
    assert [(best.text, best.finished) for best in found] == [(best.text, best.finished) for best in ours]
    assert found[1] == found[2]
    assert found[0].score == pytest.approx(ours[0].score, abs=1e-5)


def test_ctranslate2_int8_rounds():
    model, sources = random_model(4, "relative"), random_sources(20, seed=4)
    scores = {}
    for engine in ("ctranslate2", "ctranslate2-int8"):
        found = translate(model, TOKENIZER, sources, replace(SETTINGS, engine=engine), progress=False)
        scores[engine] = np.array([translation.score for translation in found])
    difference = np.abs(scores["ctranslate2"] - scores["ctranslate2-int8"])
    assert 1e-4 < np.median(difference) < 0.3


def test_ctranslate2_leaves_torch_its_threads(own_threads):
    torch.set_num_threads(3)
    translate(random_model(1, "none"), TOKENIZER, random_sources(2, seed=1), SETTINGS, progress=False)
    assert torch.get_num_threads() == 3


def test_ctranslate2_threads_share_batch_tokens(own_threads, monkeypatch):
    torch.set_num_threads(3)
    seen = []
    search = CTranslate2Engine.search

    def spy(engine: CTranslate2Engine, sources: list[np.ndarray]) -> list[Hypothesis]:
        seen.append(sum(len(source) + 1 for source in sources))
        return search(engine, sources)

    monkeypatch.setattr(CTranslate2Engine, "search", spy)
    sources = [np.full(5, 7)] * 100
    translate(random_model(1, "none"), TOKENIZER, sources, replace(SETTINGS, batch_tokens=181), progress=False)
    assert max(seen) == 60
    assert sum(seen) == 600


def test_ctranslate2_of_no_sentences_is_empty():
    assert translate(random_model(1, "none"), TOKENIZER, [], SETTINGS, progress=False) == []


def test_ctranslate2_counts_progress_in_sentences(capsys):
    model, sources = random_model(1, "none"), [*random_sources(5, seed=1), []]
    translate(model, TOKENIZER, sources, SETTINGS)
    shown = capsys.readouterr().err
    assert "translating: 100%" in shown
    assert "6/6" in shown
    translate(model, TOKENIZER, sources, SETTINGS, progress=False)
    assert capsys.readouterr().err == ""
