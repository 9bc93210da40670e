import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import EOS, PAD
from pipeline.data.bucketing import cut, pad, search_batches, search_batches_of_one_length, smallest_budget

lengths = st.lists(st.integers(1, 40), max_size=200)


@settings(deadline=None)
@given(lengths, st.integers(0, 300))
def test_cut_starts_a_batch_only_where_the_next_sentence_has_no_room(lengths, budget):
    starts = cut(np.array(lengths, dtype=np.int64), budget)
    expected, batch = [], []
    for i, length in enumerate(lengths):
        if not batch or max([*batch, length]) * (len(batch) + 1) > budget:
            expected.append(i)
            batch = []
        batch.append(length)
    assert starts == expected


def test_cut_of_hand_made_lengths():
    rising, falling = np.array([2, 2, 3, 5, 5, 9]), np.array([9, 5, 5, 3, 2, 2])
    assert cut(rising, 10) == [0, 3, 5]  # 3 * 3, 2 * 5, 1 * 9
    assert cut(falling, 10) == [0, 1, 3]  # 1 * 9, 2 * 5, 3 * 3
    assert cut(rising, 4) == [0, 2, 3, 4, 5]  # only the first two fit together into 4 tokens


@settings(deadline=None)
@given(lengths, st.integers(1, 50), st.booleans())
def test_smallest_budget_is_the_first_of_all_that_do(lengths, max_batches, falling):
    ordered = np.array(sorted(lengths, reverse=falling), dtype=np.int64)
    enough = [budget for budget in range(300) if len(cut(ordered, budget)) <= max_batches]
    assert smallest_budget(ordered, max_batches, 0, 300) == (enough[0] if enough else 300)


def test_pad_ends_each_sentence_and_fills_the_row():
    padded = pad(np.array([11, 12, 13, 21], dtype=np.uint16), np.array([3, 0, 1]))
    assert padded.tolist() == [[11, 12, 13, EOS], [EOS, PAD, PAD, PAD], [21, EOS, PAD, PAD]]
    assert padded.dtype == torch.int64


def test_search_batches_hold_every_sentence_once_longest_first_within_budget():
    lengths = np.random.default_rng(5).integers(0, 37, 203)
    batches = search_batches(lengths, 101, 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(203))
    assert all(len(indices) * (lengths[indices].max() + 1) <= 101 for indices in batches)
    longest = [lengths[indices].max() for indices in batches]
    assert longest == sorted(longest, reverse=True)
    padded = sum(len(indices) * (lengths[indices].max() + 1) for indices in batches)
    assert padded < 1.1 * (lengths + 1).sum()


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
def test_search_batches_give_workers_equal_shares(num_workers: int):
    random = np.random.default_rng(num_workers)
    for num_sentences in (203, 1000, 3000):
        lengths = random.integers(0, 37, num_sentences)
        batches = search_batches(lengths, 1001, 0, num_workers)
        assert sorted(np.concatenate(batches).tolist()) == list(range(num_sentences))
        padded = [len(indices) * (int(lengths[indices].max()) + 1) for indices in batches]
        assert max(padded) <= 1001
        rounds = -(-len(batches) // num_workers)
        assert sum(padded) > 0.95 * max(padded) * num_workers * rounds
        fewest = len(search_batches(lengths, 1001, 0))
        assert (rounds - 1) * num_workers < fewest  # no more rounds than needed


@pytest.mark.parametrize("max_extra", [3, 7, 50])
def test_search_batches_leave_short_sentences_room_for_longer_outputs(max_extra: int):
    for longest in (1, 5, 60):
        lengths = np.random.default_rng(longest).integers(0, longest + 1, 2000)
        batches = search_batches(lengths, 1000, max_extra)
        assert sorted(np.concatenate(batches).tolist()) == list(range(2000))
        assert max(len(indices) * (lengths[indices].max() + 1) for indices in batches) <= 1000
        positions = [int((lengths[indices] + max_extra + 1).sum()) for indices in batches]
        assert max(positions) <= 5 * 1000
        assert longest > 1 or max(positions) > 2 * 1000  # not smaller than necessary


def test_search_batches_share_out_sentences_that_would_fit_one_batch():
    assert [batch.tolist() for batch in search_batches(np.array([7, 7, 7, 7]), 100, 0, 2)] == [[0, 1], [2, 3]]
    assert [batch.tolist() for batch in search_batches(np.array([7]), 100, 0, 2)] == [[0]]
    assert search_batches(np.array([], dtype=np.int64), 100, 0, 2) == []


def test_search_batches_do_not_share_out_less_than_least_tokens():
    lengths = np.array([7, 7, 7, 7])
    for least_tokens, expected in ((16, [[0, 1], [2, 3]]), (17, [[0, 1, 2, 3]])):
        assert [batch.tolist() for batch in search_batches(lengths, 100, 0, 2, least_tokens)] == expected
    # but no batch exceeds the budget
    assert [batch.tolist() for batch in search_batches(lengths, 16, 0, 2, 100)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_search_batches_put_a_sentence_beyond_the_budget_alone(num_workers: int):
    lengths = np.array([3, 50, 2])
    assert [batch.tolist() for batch in search_batches(lengths, 10, 0, num_workers)] == [[1], [0, 2]]
    assert [batch.tolist() for batch in search_batches(lengths, 1, 0, num_workers)] == [[1], [0], [2]]


def test_search_batches_of_one_length_hold_each_sentence_once_within_budget():
    lengths = np.random.default_rng(5).integers(0, 37, 203)
    batches = search_batches_of_one_length(lengths, 101, max_extra=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(203))
    assert all(len(set(lengths[indices])) == 1 for indices in batches)
    assert all(len(indices) * (lengths[indices[0]] + 1) <= 101 for indices in batches)
    assert search_batches_of_one_length(np.array([], dtype=np.int64), 101, max_extra=0) == []
