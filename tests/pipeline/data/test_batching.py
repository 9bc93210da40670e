import time
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import BOS, EOS, PAD
from pipeline.data.batching import BatchPlan, Position, batches_to_read, collate, easily_shared
from pipeline.data.dataset import EncodedSplit, EncodedText


def lengths_like_multi30k(num_pairs: int = 29_000, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Return lengths as measured on Multi30k with a vocabulary of 10,000.

    Means 14.0 and 14.4, deviations 4.6 and 5.2, correlation 0.8.
    """
    rng = np.random.default_rng(seed)
    src = rng.gamma(9.3, 14.0 / 9.3, num_pairs)
    tgt = 0.9 * src + rng.normal(1.8, 3.1, num_pairs)
    return tuple(np.clip(np.round(x), 1, 60).astype(np.int64) for x in (src, tgt))


def make_plan(num_pairs: int = 2_003, **changes: int) -> BatchPlan:
    budgets = {"batch_tokens": 3_001, "micro_batch_tokens": 1_009, "max_length": 257, "seed": 5} | changes
    return BatchPlan(*lengths_like_multi30k(num_pairs), **budgets)


def flat(steps: list[list[np.ndarray]]) -> list[tuple[int, ...]]:
    return [tuple(indices) for step in steps for indices in step]


lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=300)
plans = st.builds(
    lambda pairs, batch, micro, seed: BatchPlan(
        *np.array(pairs).T, batch_tokens=batch, micro_batch_tokens=micro, max_length=41, seed=seed
    ),
    lengths,
    st.integers(1, 3_000),
    st.integers(41, 1_000),
    st.integers(0, 3),
)


@settings(deadline=None)
@given(plans, st.integers(0, 5))
def test_batch_plan_has_every_pair_once_an_epoch(plan, epoch):
    seen = [index for indices in flat(plan.steps(epoch)) for index in indices]
    assert sorted(seen) == list(range(len(plan._src)))


@settings(deadline=None)
@given(lengths, st.integers(1, 3_000), st.integers(41, 1_000))
def test_batch_plan_keeps_micro_batches_within_micro_batch_tokens(pairs, batch, micro):
    src, tgt = np.array(pairs).T
    plan = BatchPlan(src, tgt, batch_tokens=batch, micro_batch_tokens=micro, max_length=41, seed=0)
    for indices in flat(plan.steps(0)):
        for side in (src, tgt):
            assert len(indices) * (side[list(indices)].max() + 1) <= micro


@settings(deadline=None)
@given(plans, st.integers(0, 3), st.integers(0, 7))
def test_from_position_continues_as_a_run_from_the_start(plan, epoch, step):
    start = list(islice(plan.from_position(Position(0, 0)), 5 * plan.num_steps))
    position = Position(epoch, min(step, plan.num_steps))
    index = position.epoch * plan.num_steps + position.step
    expected = [(at, flat([step])) for at, step in start[index : index + plan.num_steps]]
    found = islice(plan.from_position(position), plan.num_steps)
    assert [(at, flat([step])) for at, step in found] == expected


def test_from_position_counts_steps_and_then_epochs():
    plan = make_plan()
    positions = [at for at, _ in islice(plan.from_position(Position(3, plan.num_steps - 1)), 3)]
    assert positions == [Position(3, plan.num_steps - 1), Position(4, 0), Position(4, 1)]


def test_batch_plan_depends_on_seed_and_epoch_not_on_earlier_calls():
    plan = make_plan()
    plan.steps(4)
    plan.steps(2)
    assert flat(plan.steps(1)) == flat(make_plan().steps(1))


def test_batch_plan_differs_by_seed_and_by_epoch():
    first = flat(make_plan().steps(0))
    assert flat(make_plan(seed=6).steps(0)) != first
    assert flat(make_plan().steps(1)) != first


def test_batch_plan_mixes_the_sentences_of_a_length_each_epoch():
    plan = make_plan(num_pairs=10_007)
    first, second = ({frozenset(indices) for indices in flat(plan.steps(epoch))} for epoch in (0, 1))
    assert len(first & second) < 0.1 * len(first)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_batch_plan_deals_micro_batches_to_workers_round_robin(workers):
    plan = make_plan()
    for step in plan.steps(0):
        shares = [step[rank::workers] for rank in range(workers)]
        assert sorted(flat(shares)) == sorted(flat([step]))
        assert sum(plan.num_tgt_tokens(share) for share in shares) == plan.num_tgt_tokens(step)


@pytest.mark.parametrize(
    ("batch", "micro"), [(4096, 4096), (8192, 4096), (4096, 1024), (25_000, 4096), (25_000, 25_000), (1024, 4096)]
)
def test_batch_plan_steps_have_about_batch_tokens(batch, micro):
    src, tgt = lengths_like_multi30k()
    plan = BatchPlan(src, tgt, batch_tokens=batch, micro_batch_tokens=micro, max_length=257, seed=1)
    tokens = [sum((tgt[indices] + 1).sum() for indices in step) for step in plan.steps(0)]
    assert sum(tokens) == (tgt + 1).sum()
    assert len(tokens) == plan.num_steps == pytest.approx((tgt + 1).sum() / batch, rel=0.03)
    # steps with many pairs whose source is much longer than the target have the fewest target tokens
    assert np.quantile(tokens, [0.05, 0.95]) == pytest.approx([batch, batch], rel=0.3)
    assert 0.3 * batch < min(tokens) <= max(tokens) < 1.4 * batch


def test_batch_plan_steps_have_an_easily_shared_number_of_micro_batches():
    assert [easily_shared(number) for number in range(1, 18)] == [1, 2, 4, 4, *[8] * 4, *[16] * 8, 24]
    for micro, number in ((4_700, 4), (1_300, 4), (1_000, 8), (500, 16)):
        plan = make_plan(num_pairs=29_000, batch_tokens=4_001, micro_batch_tokens=micro)
        of_steps = [len(step) for step in plan.steps(0)]
        assert max(of_steps) == plan.most_micro_batches == number
        assert plan.longest <= plan.budget <= micro
        assert of_steps.count(number) >= 0.95 * plan.num_steps


@pytest.mark.parametrize(("batch", "number"), [(45, 1), (60, 2), (85, 2), (160, 4)])
def test_batch_plan_of_small_steps_has_two_micro_batches_or_one(batch, number):
    plan = make_plan(num_pairs=29_000, batch_tokens=batch, micro_batch_tokens=10_000)
    of_steps = [len(step) for step in plan.steps(0)]
    assert max(of_steps) == number
    assert of_steps.count(number) >= 0.9 * plan.num_steps


def test_batch_plan_of_a_corpus_smaller_than_a_batch_is_one_step():
    plan = make_plan(num_pairs=11, batch_tokens=10**7)
    assert plan.num_steps == len(plan.steps(0)) == 1


@settings(deadline=None)
@given(lengths, st.integers(41, 1_000), st.integers(5, 41))
def test_batches_to_read_have_every_pair_once_and_are_full(pairs, micro, max_length):
    src, tgt = np.array(pairs).T + 1
    longest = np.maximum(src, tgt)
    if longest.min() > max_length:
        with pytest.raises(ValueError, match="none of"):
            batches_to_read(src - 1, tgt - 1, micro_batch_tokens=micro, max_length=max_length)
        return
    batches = batches_to_read(src - 1, tgt - 1, micro_batch_tokens=micro, max_length=max_length)
    order = np.concatenate(batches)
    assert sorted(order) == np.flatnonzero(longest <= max_length).tolist()
    assert (np.diff(longest[order]) >= 0).all()
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert len(batch) * longest[batch].max() <= micro
        if following is not None:
            assert (len(batch) + 1) * longest[following[0]] > micro


def test_batches_to_read_have_similar_lengths_of_the_shorter_sentence_too():
    src, tgt = lengths_like_multi30k()
    batches = batches_to_read(src, tgt, micro_batch_tokens=1_280, max_length=257)
    by_longest = np.lexsort((np.random.default_rng(0).random(len(src)), np.maximum(src, tgt)))
    by_chance = np.split(by_longest, np.cumsum([len(indices) for indices in batches])[:-1])
    num_positions = [
        sum(len(indices) * (side[indices].max() + 1) for indices in parts for side in (src, tgt))
        for parts in (batches, by_chance)
    ]
    assert num_positions[0] < 0.95 * num_positions[1]


@pytest.mark.parametrize(("micro", "share"), [(1024, 0.05), (4096, 0.08), (25_000, 0.10)])
def test_padding_share_is_measured_and_at_most_a_tenth(micro, share):
    src, tgt = lengths_like_multi30k()
    plan = BatchPlan(src, tgt, batch_tokens=max(8192, 4 * micro), micro_batch_tokens=micro, max_length=257, seed=1)
    positions = sum(
        len(indices) * (side[list(indices)].max() + 1) for indices in flat(plan.steps(0)) for side in (src, tgt)
    )
    measured = 1 - (src + 1 + tgt + 1).sum() / positions
    assert measured == pytest.approx(plan.padding_share())
    assert measured < share


def test_batch_plan_leaves_out_and_counts_pairs_longer_than_max_length():
    src, tgt = np.array([3, 10, 11, 2, 12]), np.array([3, 9, 2, 11, 12])
    plan = BatchPlan(src, tgt, batch_tokens=100, micro_batch_tokens=100, max_length=11, seed=1)
    assert plan.num_skipped == 3
    assert sorted(index for indices in flat(plan.steps(0)) for index in indices) == [0, 1]


def test_batch_plan_without_a_pair_within_max_length_is_an_error():
    with pytest.raises(ValueError, match=r"none of 2 sentence pairs has at most model.max_length \(5\) tokens"):
        BatchPlan([5, 6], [1, 1], batch_tokens=9, micro_batch_tokens=9, max_length=5, seed=1)


def test_batch_plan_names_a_pair_above_micro_batch_tokens():
    message = r"longer sentence of line 3 has 14 tokens, more than hardware.micro_batch_tokens \(13\): set that to 14"
    with pytest.raises(ValueError, match=message):
        BatchPlan([5, 6, 7], [1, 1, 13], batch_tokens=99, micro_batch_tokens=13, max_length=20, seed=1)


@pytest.mark.parametrize("position", [Position(-1, 0), Position(0, -1), Position(0, 10**6)])
def test_from_position_refuses_one_of_another_plan(position):
    with pytest.raises(ValueError, match="is outside a plan of"):
        next(make_plan().from_position(position))


def test_batch_plan_of_wmt_size_takes_seconds():
    src, tgt = lengths_like_multi30k(500_000)  # a ninth of WMT 2014; the time grows at most as n log n
    start = time.process_time()
    BatchPlan(src, tgt, batch_tokens=25_000, micro_batch_tokens=4096, max_length=257, seed=1).steps(0)
    assert time.process_time() - start < 2.2  # 20 s / 9; measured: 0.3 s


def text(*sentences: list[int]) -> EncodedText:
    ends = np.cumsum([0, *map(len, sentences)])
    return EncodedText(np.array(list(chain(*sentences)), dtype=np.uint16), ends.astype(np.int64))


@pytest.fixture
def split() -> EncodedSplit:
    return EncodedSplit(text([11], [12, 13, 14], [15, 16]), text([21, 22], [], [23, 24, 25, 26]))


def test_collate_lays_out_source_decoder_input_and_decoder_output(split):
    batch = collate(split, np.array([2, 0, 1]))
    assert batch.src.tolist() == [[15, 16, EOS, PAD], [11, EOS, PAD, PAD], [12, 13, 14, EOS]]
    assert batch.tgt_in.tolist() == [
        [BOS, 23, 24, 25, 26],
        [BOS, 21, 22, PAD, PAD],
        [BOS, PAD, PAD, PAD, PAD],
    ]
    assert batch.tgt_out.tolist() == [
        [23, 24, 25, 26, EOS],
        [21, 22, EOS, PAD, PAD],
        [EOS, PAD, PAD, PAD, PAD],
    ]
    assert batch.num_tgt_tokens == 9 == int((batch.tgt_out != PAD).sum())
    assert {x.dtype for x in (batch.src, batch.tgt_in, batch.tgt_out)} == {torch.int64}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(4, 65_535), max_size=9), min_size=1, max_size=9), st.randoms())
def test_collate_gives_the_sentences(sentences, random):
    order = random.sample(range(len(sentences)), len(sentences))
    batch = collate(EncodedSplit(text(*sentences), text(*sentences)), np.array(order))
    for row, index in enumerate(order):
        assert [x for x in batch.src[row].tolist() if x != PAD] == [*sentences[index], EOS]
        assert [x for x in batch.tgt_in[row].tolist() if x != PAD] == [BOS, *sentences[index]]
        assert batch.tgt_out[row].tolist() == batch.src[row].tolist()


def test_collate_counts_the_target_tokens_that_the_plan_counts():
    rng = np.random.default_rng(3)
    sentences = [rng.integers(4, 99, size=rng.integers(1, 23)).tolist() for _ in range(211)]
    split = EncodedSplit(text(*sentences), text(*sentences[::-1]))
    plan = BatchPlan(
        split.src.lengths, split.tgt.lengths, batch_tokens=307, micro_batch_tokens=101, max_length=29, seed=1
    )
    for step in plan.steps(0):
        batches = [collate(split, indices) for indices in step]
        assert sum(batch.num_tgt_tokens for batch in batches) == plan.num_tgt_tokens(step)
        assert max(max(batch.src.numel(), batch.tgt_out.numel()) for batch in batches) <= 101
