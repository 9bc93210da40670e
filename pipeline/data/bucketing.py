"""Group sentences by length and pad them, for training, validation and search alike.

Sentences are sorted by length and cut, in that order, into batches with at most `budget` positions, with padding.
`pipeline.data.batching` uses this for sentence pairs, `pipeline.inference` for source sentences.
"""

import numpy as np
import torch
from torch import Tensor

from model.config import EOS, PAD


def cut(lengths: np.ndarray, budget: int) -> list[int]:
    """Cut `lengths`, in their order, into batches as large as `budget` allows. Returns the start of each batch.

    A batch of n sentences has n * (its longest length) positions, at most `budget`. A sentence longer than `budget`
    is a batch of its own. Every length must be at least 1.
    """
    starts = []
    start = 0
    while start < len(lengths):
        starts.append(start)
        room = lengths[start : start + max(1, budget // int(lengths[start]))]  # no batch can end later
        positions = np.maximum.accumulate(room) * np.arange(1, len(room) + 1, dtype=np.int64)
        start += max(1, int(np.searchsorted(positions, budget, side="right")))
    return starts


def smallest_budget(lengths: np.ndarray, max_batches: int, lowest: int, highest: int) -> int:
    """The smallest budget in [lowest, highest] with which `cut` makes at most `max_batches`; `highest` if none does.

    With the smallest budget, all batches are nearly full. `lengths` must be sorted, ascending or descending: then a
    larger budget never makes more batches, and a binary search is correct.
    """
    while lowest < highest:
        middle = (lowest + highest) // 2
        if len(cut(lengths, middle)) <= max_batches:
            highest = middle
        else:
            lowest = middle + 1
    return lowest


def pad(tokens: np.ndarray, lengths: np.ndarray) -> Tensor:
    """Pad sentences to an int64 tensor [sentences, longest + 1]: each row has the tokens, EOS, then PAD.

    `tokens` is the concatenation of all sentences; `lengths` [sentences] are without EOS.
    """
    padded = np.full((len(lengths), int(lengths.max()) + 1), PAD, dtype=np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)  # [tokens]
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # [tokens]
    padded[rows, columns] = tokens
    padded[np.arange(len(lengths)), lengths] = EOS
    return torch.from_numpy(padded)


def search_batches(
    lengths: np.ndarray, batch_tokens: int, max_extra: int, num_workers: int = 1, least_tokens: int = 1
) -> list[np.ndarray]:
    """Batches of sentence indices for a search, longest sentences first. `lengths` are without EOS.

    A batch has at most `batch_tokens` source positions, with EOS and padding. An output may have `max_extra` more
    tokens than its source, so a short sentence counts as at least `max_extra` / 4 positions: then the outputs of a
    batch have at most 5 * batch_tokens positions, however short its sentences are.

    The number of batches is rounded up to a multiple of `num_workers`, and the batches are made as small as that
    number allows, so that all workers finish at about the same time. The rounding never makes them smaller than
    `least_tokens` positions on average.
    """
    order = np.argsort(-lengths, kind="stable")
    widths = np.maximum(lengths[order] + 1, -(-max_extra // 4))
    fewest = len(cut(widths, batch_tokens))
    rounds = -(-fewest // num_workers)
    most = max(fewest, min(rounds * num_workers, int(widths.sum()) // max(1, least_tokens)))
    budget = smallest_budget(widths, most, lowest=0, highest=batch_tokens)
    starts = cut(widths, budget)
    return np.split(order, starts[1:]) if starts else []


def search_batches_of_one_length(lengths: np.ndarray, batch_tokens: int, max_extra: int) -> list[np.ndarray]:
    """The batches of `search_batches`, cut where the length changes: the sentences of each have the same length."""
    return [
        part
        for indices in search_batches(lengths, batch_tokens, max_extra)
        for part in np.split(indices, np.flatnonzero(np.diff(lengths[indices])) + 1)
    ]
