"""Batches by token count, of similar length, from a seeded plan (section 5.1).

The plan is a pure function of the lengths, the seed and the epoch: every worker computes the same one, and
a pair of integers says where in it a run stands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.config import BOS, EOS, PAD
from pipeline.data.dataset import EncodedSplit, EncodedText

MIN_MICRO_BATCHES = 4
"""The fewest of a step. Each has sentences of about one length, and models learn less from a step of few lengths
(docs/performance.md). The paper's steps were shared by eight GPUs."""


@dataclass(frozen=True)
class Position:
    """The next step to take; `step` counts inside the epoch, from 0."""

    epoch: int
    step: int


class BatchPlan:
    """Which sentence pairs each optimiser step sees.

    A step has about `batch_tokens` target tokens (padding not counted), in micro-batches of similar length
    that pass through the model one by one, or one in each thread. A micro-batch has at most `micro_batch_tokens`
    source and as many target positions, padding counted; all are made as much smaller as it takes for a step to
    be MIN_MICRO_BATCHES or more of them (fewer, if the longest pair needs more than such a part of a step), a number
    that is `easily_shared` by workers and threads. So no step is much smaller or larger than the others. Chance says
    which ones share a step. Every pair comes once an epoch, but those longer than `max_length` positions on a side:
    `num_skipped` counts them. A step has `most_micro_batches` at most, each of at most `budget` positions a side; the
    longest pair has `longest`.

    `src_lengths` and `tgt_lengths` are pieces without end of sentence, which is counted here (+1 each).
    Raises ValueError if no pair is left, or if one alone exceeds `micro_batch_tokens`.
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
        self._src = np.asarray(src_lengths, dtype=np.int32) + 1
        self._tgt = np.asarray(tgt_lengths, dtype=np.int32) + 1
        longest = np.maximum(self._src, self._tgt)
        # By the longer side, which alone decides where a micro-batch is full: the cuts hold for every epoch.
        self._pairs = _by_length(longest, max_length, micro_batch_tokens)
        self.num_skipped = len(longest) - len(self._pairs)
        self._longest = longest[self._pairs]
        self.longest = int(self._longest[-1])
        num_steps = max(1, round(int(self._tgt[self._pairs].sum()) / batch_tokens))
        needed = -(-len(_cut(self._longest, micro_batch_tokens)) // num_steps)
        wanted = MIN_MICRO_BATCHES
        while wanted > 1 and not self._fit(wanted * num_steps):  # or steps would have different numbers of them
            wanted //= 2
        per_step = easily_shared(max(needed, wanted))
        self.budget = _budget(self._longest, per_step * num_steps, micro_batch_tokens)
        self._starts = _cut(self._longest, self.budget)
        self.num_steps = min(num_steps, len(self._starts))
        self.most_micro_batches = -(-len(self._starts) // self.num_steps)
        self._cached: tuple[int, list[list[np.ndarray]]] = (-1, [])

    def _fit(self, parts: int) -> bool:
        """Whether a cut can make so many, none smaller than the longest pair. If the pairs fill them, it can; else
        the cut itself has to tell, which takes seconds for millions of pairs."""
        return parts * self.longest <= int(self._longest.sum()) or parts <= len(_cut(self._longest, self.longest))

    def steps(self, epoch: int) -> list[list[np.ndarray]]:
        """The epoch's steps, each a list of micro-batches, each an array of sentence indices."""
        if self._cached[0] != epoch:
            self._cached = (epoch, self._plan(epoch))
        return self._cached[1]

    def _plan(self, epoch: int) -> list[list[np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        # Among pairs whose longer sides are equal, neighbours are alike in the shorter side too, give or take
        # one piece: chance mixes them, and costs a percent of padding.
        shape = _shape(self._src, self._tgt, self._longest, self._pairs)
        order = np.lexsort((shape + rng.uniform(-1, 1, len(shape)), self._longest))
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
        """Of all positions that the epoch passes through the model, both sides, the share that is padding."""
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
    src, tgt = (np.asarray(lengths, dtype=np.int32) + 1 for lengths in (src_lengths, tgt_lengths))
    longest = np.maximum(src, tgt)
    pairs = _by_length(longest, max_length, micro_batch_tokens)
    order = np.lexsort((_shape(src, tgt, longest[pairs], pairs), longest[pairs]))
    return np.split(pairs[order], _cut(longest[pairs], micro_batch_tokens)[1:])


def easily_shared(number: int) -> int:
    """From `number` up, the first that two, four or eight share alike (threads or workers), if it is large enough: a
    power of two up to 8, a multiple of 8 beyond."""
    unit = min(8, 1 << (number - 1).bit_length())
    return -(-number // unit) * unit


def _by_length(longest: np.ndarray, max_length: int, micro_batch_tokens: int) -> np.ndarray:
    """The pairs within `max_length`, ascending. Raises ValueError."""
    pairs = np.flatnonzero(longest <= max_length)
    if not len(pairs):
        raise ValueError(f"none of {len(longest)} sentence pairs has at most max_length ({max_length}) pieces")
    pairs = pairs[np.argsort(longest[pairs], kind="stable")]
    worst = pairs[-1]
    if longest[worst] > micro_batch_tokens:
        raise ValueError(
            f"the sentence pair of line {worst + 1} has {longest[worst]} pieces on one side: more than "
            f"micro_batch_tokens ({micro_batch_tokens}); raise it, or lower max_length"
        )
    return pairs


def _shape(src: np.ndarray, tgt: np.ndarray, longest: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """What to sort pairs by whose longer sides are equal. Every other length runs backwards, so that a micro-batch
    that spans two lengths finds pairs that are alike there as well."""
    return (src - tgt)[pairs] * (1 - 2 * (longest % 2))


def _cut(longest: np.ndarray, budget: int) -> list[int]:
    """Starts of parts of ascending lengths, each of at most `budget` positions when padded."""
    starts = []
    start = 0
    while start < len(longest):
        starts.append(start)
        lengths = longest[start : start + budget // int(longest[start])]
        positions = lengths * np.arange(1, len(lengths) + 1, dtype=np.int64)
        start += int(np.searchsorted(positions, budget, side="right"))
    return starts


def _budget(longest: np.ndarray, parts: int, most: int) -> int:
    """The smallest, up to `most`, that makes at most `parts`: all are nearly full."""
    low, high = int(longest[-1]), most  # more budget never makes more parts: search by halves
    while low < high:
        middle = (low + high) // 2
        if len(_cut(longest, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass
class MicroBatch:
    """Padded sentence pairs, int64. The decoder reads `tgt_in` and is to say `tgt_out` (Figure 1)."""

    src: Tensor  # [sentences, S], ends in EOS
    tgt_in: Tensor  # [sentences, T], BOS and the pieces
    tgt_out: Tensor  # [sentences, T], the pieces and EOS
    num_tgt_tokens: int  # of tgt_out, padding not counted


def collate(split: EncodedSplit, indices: np.ndarray) -> MicroBatch:
    """The sentence pairs of these indices, in this order."""
    src, _ = _pad(split.src, indices)
    tgt, num_tgt_tokens = _pad(split.tgt, indices)
    tgt_in = np.full_like(tgt, PAD)
    tgt_in[:, 0] = BOS
    tgt_in[:, 1:] = np.where(tgt[:, :-1] == EOS, PAD, tgt[:, :-1])
    return MicroBatch(torch.from_numpy(src), torch.from_numpy(tgt_in), torch.from_numpy(tgt), num_tgt_tokens)


def _pad(text: EncodedText, indices: np.ndarray) -> tuple[np.ndarray, int]:
    """[sentences, longest + 1] of pieces, EOS, PAD; and the number that are not PAD."""
    starts = text.offsets[indices]
    lengths = text.offsets[indices + 1] - starts
    padded = np.full((len(indices), int(lengths.max()) + 1), PAD, dtype=np.int64)
    rows = np.repeat(np.arange(len(indices)), lengths)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    padded[rows, columns] = text.ids[np.repeat(starts, lengths) + columns]
    padded[np.arange(len(indices)), lengths] = EOS
    return padded, int(lengths.sum()) + len(indices)
