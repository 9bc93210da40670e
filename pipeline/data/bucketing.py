"""Grouping sentences by length and padding them: the one policy of training, validation and search.

Sentences are sorted by length and cut, in that order, into batches of at most a budget of positions, padding counted.
`pipeline.data.batching` uses this for sentence pairs, `pipeline.inference` for sources.
"""

import numpy as np
import torch
from torch import Tensor

from model.config import EOS, PAD


def cut(lengths: np.ndarray, budget: int) -> list[int]:
    """Starts of the batches when `lengths`, in their order, are cut as late as `budget` allows.

    A batch of n sentences has n * max(lengths of it) positions, at most `budget`; a sentence longer than that is a
    batch of its own. Every length is at least 1.
    """
    starts = []
    start = 0
    while start < len(lengths):
        starts.append(start)
        room = lengths[start : start + max(1, budget // int(lengths[start]))]  # no batch reaches further
        positions = np.maximum.accumulate(room) * np.arange(1, len(room) + 1, dtype=np.int64)
        start += max(1, int(np.searchsorted(positions, budget, side="right")))
    return starts


def smallest_budget(lengths: np.ndarray, max_batches: int, lowest: int, highest: int) -> int:
    """The smallest budget in [lowest, highest] that `cut` turns into at most `max_batches`, so that all of them are
    nearly full; `highest` if none does. `lengths` are sorted, either way: then more budget never makes more batches.
    """
    while lowest < highest:
        middle = (lowest + highest) // 2
        if len(cut(lengths, middle)) <= max_batches:
            highest = middle
        else:
            lowest = middle + 1
    return lowest


def pad(tokens: np.ndarray, lengths: np.ndarray) -> Tensor:
    """[sentences, longest + 1], int64: each row a sentence, EOS, then PAD.

    `tokens` has all sentences end to end; `lengths` [sentences] are without EOS.
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

    A batch has at most `batch_tokens` source positions, EOS and padding counted. A sentence counts as a quarter of
    `max_extra` positions at least, by which outputs may be longer than sources. So outputs of up to that length have
    at most 5 * batch_tokens positions together, however short the sentences are.

    There are as many batches as fill whole rounds of the workers, and they are as small as that allows: none waits
    long for the last. For that alone they are not made smaller than `least_tokens` on average.
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
    """Those of `search_batches`, cut where the length changes."""
    return [
        part
        for indices in search_batches(lengths, batch_tokens, max_extra)
        for part in np.split(indices, np.flatnonzero(np.diff(lengths[indices])) + 1)
    ]
