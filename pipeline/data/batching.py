"""Batches of sentence pairs by token count, of similar length, from a seeded plan (section 5.1).

The plan is a pure function of the lengths, the seed and the epoch: every worker computes the same one, and
a pair of integers tells where in it a run is.
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
"""The fewest of a step. Each has sentences of about one length, and models learn less from a step of few lengths
(docs/performance.md). The paper's steps were shared by eight GPUs."""


class Position(NamedTuple):
    """The next step to take; `step` counts inside the epoch, from 0."""

    epoch: int
    step: int


class BatchPlan:
    """Which sentence pairs each optimiser step sees.

    A step is a list of micro-batches, which pass through the model one by one, or one in each thread or worker, and
    whose gradients are added. How the plan is made:

    1. Pairs longer than `max_length` are left out (`num_skipped`); the others are sorted by length, which is here the
       longer of source and target.
    2. An epoch has as many steps as make `batch_tokens` target tokens a step, padding not counted.
    3. A step has MIN_MICRO_BATCHES or more micro-batches, more if `micro_batch_tokens` is too small for that, and a
       number that is `easily_shared` by threads and workers.
    4. The sorted pairs are cut into that number times steps of nearly equal micro-batches: `budget`, the positions
       that one may have in the source and in the target, padding counted, is the smallest that does it. All steps
       have about the same size and number of micro-batches, at most `most_micro_batches`.
    5. Each epoch mixes the pairs of like lengths, cuts them at the same places and deals the micro-batches out to
       steps by chance. Every pair comes once an epoch.

    `src_lengths` and `tgt_lengths` are tokens without end of sentence, which is counted here (+1 each); the longest
    pair has `longest`. Raises ValueError if no pair is left, or if one alone exceeds `micro_batch_tokens`.
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
        """As many as `micro_batch_tokens` needs, and MIN_MICRO_BATCHES or the largest half of it that fits."""
        needed = -(-len(cut(self._lengths, micro_batch_tokens)) // num_steps)
        wanted = MIN_MICRO_BATCHES
        while wanted > 1 and not self._can_be_cut_into(wanted * num_steps):
            wanted //= 2
        return easily_shared(max(needed, wanted))

    def _can_be_cut_into(self, num_micro_batches: int) -> bool:
        """Whether so many can all have room for the longest pair; if not, steps would differ in their number.

        If the pairs fill so many, they can; else only the cut can tell, which takes seconds for millions of pairs.
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
        # Pairs of equal length are sorted by the shorter sentence too, give or take a token: chance mixes neighbours,
        # and a micro-batch has little padding in either language.
        difference = (self._src - self._tgt)[self._pairs]
        order = np.lexsort((difference + rng.uniform(-1, 1, len(difference)), self._lengths))
        micro_batches = np.split(self._pairs[order], self._starts[1:])
        shuffled = [micro_batches[i] for i in rng.permutation(len(micro_batches))]
        bounds = [len(shuffled) * i // self.num_steps for i in range(self.num_steps + 1)]
        return [shuffled[start:end] for start, end in pairwise(bounds)]

    def from_position(self, position: Position) -> Iterator[tuple[Position, list[np.ndarray]]]:
        """All steps from `position` on, without end, each with its own position."""
        epoch, first = position.epoch, position.step
        if epoch < 0 or not 0 <= first <= self.num_steps:
            raise ValueError(f"{position} is not in a plan of {self.num_steps} steps an epoch")
        while True:
            for step in range(first, self.num_steps):
                yield Position(epoch, step), self.steps(epoch)[step]
            epoch, first = epoch + 1, 0

    def num_tgt_tokens(self, step: Sequence[np.ndarray]) -> int:
        """Target tokens of these micro-batches, end of sentence counted, padding not."""
        return sum(int(self._tgt[indices].sum()) for indices in step)

    def padding_share(self, epoch: int = 0) -> float:
        """The share of padding in all positions, source and target, that the epoch passes through the model."""
        tokens = positions = 0
        for indices in (indices for step in self.steps(epoch) for indices in step):
            for lengths in (self._src[indices], self._tgt[indices]):
                tokens += int(lengths.sum())
                positions += len(lengths) * int(lengths.max())
        return 1 - tokens / positions


def batches_to_read(
    src_lengths: np.ndarray, tgt_lengths: np.ndarray, *, micro_batch_tokens: int, max_length: int
) -> list[np.ndarray]:
    """Micro-batches of a split that is only read, as large as they may be, the shortest sentences first. Sizes,
    pairs that are left out and errors are as in BatchPlan."""
    src, tgt, longer = _positions(src_lengths, tgt_lengths)
    pairs = _by_length(longer, max_length, micro_batch_tokens)
    order = np.lexsort(((src - tgt)[pairs], longer[pairs]))
    return np.split(pairs[order], cut(longer[pairs], micro_batch_tokens)[1:])


def easily_shared(number: int) -> int:
    """From `number` up, the first that two, four or eight share alike (threads or workers), if it is large enough: a
    power of two up to 8, a multiple of 8 beyond."""
    unit = min(8, 1 << (number - 1).bit_length())
    return -(-number // unit) * unit


def _positions(src_lengths: np.ndarray, tgt_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair, EOS counted: those of the source, of the target and of the longer of the two."""
    src, tgt = (np.asarray(lengths, dtype=np.int32) + 1 for lengths in (src_lengths, tgt_lengths))
    return src, tgt, np.maximum(src, tgt)


def _by_length(longer: np.ndarray, max_length: int, micro_batch_tokens: int) -> np.ndarray:
    """Indices of the pairs within `max_length`, by ascending length. Raises ValueError."""
    pairs = np.flatnonzero(longer <= max_length)
    if not len(pairs):
        raise ValueError(f"none of {len(longer)} sentence pairs has at most model.max_length ({max_length}) tokens")
    pairs = pairs[np.argsort(longer[pairs], kind="stable")]
    worst = pairs[-1]
    if longer[worst] > micro_batch_tokens:
        raise ValueError(
            f"the pair of line {worst + 1} has {longer[worst]} tokens on one side, more than "
            f"hardware.micro_batch_tokens ({micro_batch_tokens}): set that to {longer[worst]} or more, or lower "
            "model.max_length, which leaves longer pairs out of training"
        )
    return pairs


@dataclass
class MicroBatch:
    """Padded sentence pairs, int64. The decoder reads `tgt_in` and predicts `tgt_out` (Figure 1)."""

    src: Tensor  # [sentences, S], ends in EOS
    tgt_in: Tensor  # [sentences, T], BOS and the tokens
    tgt_out: Tensor  # [sentences, T], the tokens and EOS
    num_tgt_tokens: int  # of tgt_out, padding not counted


def collate(split: EncodedSplit, indices: np.ndarray) -> MicroBatch:
    """The sentence pairs of these indices, in this order."""
    src = pad(*split.src.gather(indices))
    tokens, lengths = split.tgt.gather(indices)
    tgt_out = pad(tokens, lengths)
    tgt_in = torch.full_like(tgt_out, PAD)
    tgt_in[:, 0] = BOS
    tgt_in[:, 1:] = tgt_out[:, :-1].masked_fill(tgt_out[:, :-1] == EOS, PAD)
    return MicroBatch(src, tgt_in, tgt_out, len(tokens) + len(lengths))
