"""The KV cache of a search compared with the whole decoder, and what it copies."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch

from model.config import BOS, EOS, Positions
from model.kv_cache import STEPS_OF_SPACE, BeamKVCache
from tests.factories import build, config, sentences, shifted

POSITIONS = get_args(Positions)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_kv_cache_step_by_step_gives_the_logits_of_the_whole_decoder(positions, norm):
    model = build(config(positions=positions, norm=norm))
    src, tgt = sentences([5, 17, 11]), shifted(sentences([19, 19, 19], seed=3))
    whole = model.logits(model(src, tgt))
    cache = BeamKVCache(model, src)
    steps = torch.stack([cache.logits(cache.step(tgt[:, t])) for t in range(tgt.size(1))], dim=1)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_kv_cache_reorder_and_select_sentences_keep_the_rows_named(positions):
    model = build(config(positions=positions))
    src, tgt = sentences([5, 17, 11]), shifted(sentences([7, 7, 7], seed=3))
    cache = BeamKVCache(model, src)
    for t in range(3):
        cache.step(tgt[:, t])
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))  # beam size 2
    next_tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    cache.step(next_tokens)
    cache.reorder(torch.tensor([1, 0, 2, 2, 5, 4]))
    cache.select_sentences(torch.tensor([2, 0]))
    logits = cache.logits(cache.step(torch.tensor([11, 12, 13, 14])))
    sentence, second = torch.tensor([2, 2, 0, 0]), torch.tensor([10, 9, 6, 5])
    whole = torch.cat((tgt[sentence, :3], second[:, None], torch.tensor([[11], [12], [13], [14]])), dim=1)
    torch.testing.assert_close(logits, model.logits(model(src[sentence], whole))[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("seed", range(3))
def test_kv_cache_gives_the_whole_decoders_logits_through_a_long_search(positions, seed):
    """Beam rows are replaced, sentences are removed, and the cache grows several times."""
    model, random = build(config(positions=positions)), np.random.default_rng(seed)
    src, beam = sentences([5, 17, 11, 9]), 3
    cache, left = BeamKVCache(model, src), [0, 1, 2, 3]
    outputs = [[[BOS]] for _ in left]  # [sentence][row], for the sentences that are left
    for t in range(4 * STEPS_OF_SPACE):
        last = torch.tensor([row[-1] for rows in outputs for row in rows])
        logits = cache.logits(cache.step(last))
        rows = torch.tensor([row for rows in outputs for row in rows])
        whole = model.logits(model(src[left].repeat_interleave(len(outputs[0]), 0), rows))[:, -1]
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
        if t % 7 == 6 and len(left) > 1:
            stay = random.permutation(len(left))[:-1].tolist()
            cache.select_sentences(torch.tensor(stay))
            left, outputs = [left[i] for i in stay], [outputs[i] for i in stay]
        parents = random.integers(len(outputs[0]), size=(len(left), beam))
        first_row = len(outputs[0]) * np.arange(len(left))
        cache.reorder(torch.from_numpy((first_row[:, None] + parents).ravel()))
        new = random.integers(EOS + 1, 23, size=parents.shape).tolist()
        outputs = [
            [[*rows[parent], token] for parent, token in zip(*chosen, strict=True)]
            for rows, *chosen in zip(outputs, parents, new, strict=True)
        ]


def test_kv_cache_reorder_copies_no_keys_or_values():
    cache = BeamKVCache(build(), sentences([5, 17, 11]))
    cache.step(torch.tensor([1, 1, 1]))
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    places = []
    for _ in range(4 * STEPS_OF_SPACE):
        cache.step(torch.arange(5, 11))
        cache.reorder(torch.tensor([1, 0, 3, 3, 5, 4]))
        places.append([x.data_ptr() for kv in cache.kv_cache for x in kv])
    assert sum(before != after for before, after in pairwise(places)) <= 4
