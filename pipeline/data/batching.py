"""The batch plan: optimizer steps of a given number of target tokens (section 5.1), made of micro-batches of pairs of
similar length.

The plan is a pure function of the lengths, the limits, the seed and the epoch. Every worker computes the same plan,
and a pair of integers (epoch, step) is the position of a run in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import BOS, EOS, PAD
from pipeline.data.bucketing import cut, pad, smallest_budget
from pipeline.data.dataset import EncodedSplit

MIN_MICRO_BATCHES = 4
"""The minimum number of micro-batches per step, if the pairs can be cut into that many.

The sentences of a micro-batch have about the same length, and models learn less from steps with few different lengths
(docs/performance.md). The paper's steps were split across eight GPUs, so each had at least eight."""


class Position(NamedTuple):
    """The next step of a run. `step` counts from 0 within the epoch."""

    epoch: int
    step: int


class BatchPlan:
    """The sentence pairs of each optimizer step.

    A step is a list of micro-batches. The model processes them one by one, or in parallel in threads and workers,
    and their gradients are added. The plan is made as follows:

    1. Leave out pairs longer than `max_length` (`num_skipped`) and sort the others by length. The length of a pair is
       that of its longer sentence.
    2. Choose the number of steps per epoch: the one with which a step has `batch_tokens` target tokens on average,
       without padding.
    3. Choose the number of micro-batches per step: the number that `micro_batch_tokens` requires, but at least
       MIN_MICRO_BATCHES if the pairs can be cut into that many. It is rounded up to one that is `easily_shared` by
       threads and workers.
    4. Cut the sorted pairs into at most (steps * micro-batches per step) micro-batches. Each has at most `budget`
       source positions and `budget` target positions, with padding. `budget` is as small as possible, so that all
       micro-batches are nearly full. A step has about the chosen number of them, at most `most_micro_batches`.
    5. In each epoch, shuffle pairs of equal length, cut at the same places, and assign the micro-batches to steps
       at random. Every pair occurs once per epoch.

    `src_lengths` and `tgt_lengths` [pairs] are numbers of tokens without end of sentence, which is added here (+1).
    `longest` is the length of the longest pair, with it. Raises ValueError if no pair is left, or if a single pair
    exceeds `micro_batch_tokens`.
    """

    def __init__(
        self,
        src_lengths: np.ndarray,
        tgt_lengths: np.ndarray,
        *,
        batch_tokens: int,
        micro_batch_tokens: int,
        max_length: int,
        seed: int,
    ) -> None:
        self.seed = seed
        self._src, self._tgt, longer = _positions(src_lengths, tgt_lengths)
        self._pairs = _by_length(longer, max_length, micro_batch_tokens)
        self.num_skipped = len(longer) - len(self._pairs)
        self._lengths = longer[self._pairs]  # ascending
        self.longest = int(self._lengths[-1])

        num_steps = max(1, round(int(self._tgt[self._pairs].sum()) / batch_tokens))
        num_micro_batches = num_steps * self._micro_batches_per_step(num_steps, micro_batch_tokens)
        self.budget = smallest_budget(
            self._lengths, num_micro_batches, lowest=self.longest, highest=micro_batch_tokens
        )
        self._starts = cut(self._lengths, self.budget)
        self.num_steps = min(num_steps, len(self._starts))
        self.most_micro_batches = -(-len(self._starts) // self.num_steps)
        self._cached: tuple[int, list[list[np.ndarray]]] = (-1, [])

    def _micro_batches_per_step(self, num_steps: int, micro_batch_tokens: int) -> int:
        """As many as `micro_batch_tokens` requires, and at least MIN_MICRO_BATCHES; that minimum is halved until the
        pairs can be cut into that many."""
        needed = -(-len(cut(self._lengths, micro_batch_tokens)) // num_steps)
        wanted = MIN_MICRO_BATCHES
        while wanted > 1 and not self._can_be_cut_into(wanted * num_steps):
            wanted //= 2
        return easily_shared(max(needed, wanted))

    def _can_be_cut_into(self, num_micro_batches: int) -> bool:
        """Whether there are this many micro-batches with a budget that holds the longest pair. If not, steps would
        differ in their number of micro-batches.

        The first check is fast and sufficient. The cut is exact, but takes seconds for millions of pairs.
        """
        if num_micro_batches * self.longest <= int(self._lengths.sum()):
            return True
        return num_micro_batches <= len(cut(self._lengths, self.longest))

    def steps(self, epoch: int) -> list[list[np.ndarray]]:
        """The epoch's steps, each a list of micro-batches, each an array of sentence indices."""
        if self._cached[0] != epoch:
            self._cached = (epoch, self._plan(epoch))
        return self._cached[1]

    def _plan(self, epoch: int) -> list[list[np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        # Pairs of equal length are sorted by the difference of their two lengths plus up to one token of noise, which
        # shuffles neighbours while keeping padding low in both languages.
        difference = (self._src - self._tgt)[self._pairs]
        order = np.lexsort((difference + rng.uniform(-1, 1, len(difference)), self._lengths))
        micro_batches = np.split(self._pairs[order], self._starts[1:])
        shuffled = [micro_batches[i] for i in rng.permutation(len(micro_batches))]
        bounds = [len(shuffled) * i // self.num_steps for i in range(self.num_steps + 1)]
        return [shuffled[start:end] for start, end in pairwise(bounds)]

    def from_position(self, position: Position) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """Yield all steps from `position` on with their positions, without end."""
        epoch, first = position.epoch, position.step
        if epoch < 0 or not 0 <= first <= self.num_steps:
            raise ValueError(f"{position} is outside a plan of {self.num_steps} steps per epoch")
        while True:
            for step in range(first, self.num_steps):
                yield Position(epoch, step), self.steps(epoch)[step]
            epoch, first = epoch + 1, 0

    def num_tgt_tokens(self, step: Sequence[np.ndarray]) -> int:
        """Target tokens of these micro-batches, with end of sentence, without padding."""
        return sum(int(self._tgt[indices].sum()) for indices in step)

    def padding_share(self, epoch: int = 0) -> float:
        """The share of padding among the source and target positions of an epoch, in [0, 1)."""
        tokens = positions = 0
        for indices in (indices for step in self.steps(epoch) for indices in step):
            for lengths in (self._src[indices], self._tgt[indices]):
                tokens += int(lengths.sum())
                positions += len(lengths) * int(lengths.max())
        return 1 - tokens / positions


def batches_to_read(
    src_lengths: np.ndarray, tgt_lengths: np.ndarray, *, micro_batch_tokens: int, max_length: int
) -> list[np.ndarray]:
    """Micro-batches for one pass without training, as large as allowed, shortest sentences first.

    Lengths, pairs that are left out, and errors are as in BatchPlan.
    """
    src, tgt, longer = _positions(src_lengths, tgt_lengths)
    pairs = _by_length(longer, max_length, micro_batch_tokens)
    order = np.lexsort(((src - tgt)[pairs], longer[pairs]))
    return np.split(pairs[order], cut(longer[pairs], micro_batch_tokens)[1:])


def easily_shared(number: int) -> int:
    """Round `number` up so that 2, 4 or 8 threads or workers get equal shares: to a power of two up to 8, else to a
    multiple of 8."""
    unit = min(8, 1 << (number - 1).bit_length())
    return -(-number // unit) * unit


def _positions(src_lengths: np.ndarray, tgt_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lengths with EOS, each [pairs]: of the source, of the target, and of the longer of the two."""
    src, tgt = (np.asarray(lengths, dtype=np.int32) + 1 for lengths in (src_lengths, tgt_lengths))
    return src, tgt, np.maximum(src, tgt)


def _by_length(longer: np.ndarray, max_length: int, micro_batch_tokens: int) -> np.ndarray:
    """Indices of the pairs within `max_length`, by ascending length. Raises the ValueError of BatchPlan."""
    pairs = np.flatnonzero(longer <= max_length)
    if not len(pairs):
        raise ValueError(f"none of {len(longer)} sentence pairs has at most model.max_length ({max_length}) tokens")
    pairs = pairs[np.argsort(longer[pairs], kind="stable")]
    worst = pairs[-1]
    if longer[worst] > micro_batch_tokens:
        raise ValueError(
            f"the longer sentence of line {worst + 1} has {longer[worst]} tokens, more than "
            f"hardware.micro_batch_tokens ({micro_batch_tokens}): set that to {longer[worst]} or more, or lower "
            "model.max_length to leave longer pairs out of training"
        )
    return pairs


@dataclass
class MicroBatch:
    """Padded sentence pairs, int64. The decoder reads `tgt_in` and predicts `tgt_out` (Figure 1)."""

    src: Tensor  # [sentences, src], the tokens and EOS
    tgt_in: Tensor  # [sentences, tgt], BOS and the tokens
    tgt_out: Tensor  # [sentences, tgt], the tokens and EOS
    num_tgt_tokens: int  # of tgt_out, without padding


def collate(split: EncodedSplit, indices: np.ndarray) -> MicroBatch:
    """Make a micro-batch of the sentence pairs with these indices, in this order."""
    src = pad(*split.src.gather(indices))
    tokens, lengths = split.tgt.gather(indices)
    tgt_out = pad(tokens, lengths)
    tgt_in = torch.full_like(tgt_out, PAD)
    tgt_in[:, 0] = BOS
    tgt_in[:, 1:] = tgt_out[:, :-1].masked_fill(tgt_out[:, :-1] == EOS, PAD)
    return MicroBatch(src, tgt_in, tgt_out, len(tokens) + len(lengths))
