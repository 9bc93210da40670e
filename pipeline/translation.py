"""Pieces to text by beam search (section 6.1), in batches: what evaluation and a served model share."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.config import EOS, PAD
from model.decoding import Hypothesis, beam_search
from model.transformer import Transformer
from pipeline.corpus import EncodedText
from pipeline.params import Evaluate

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Pieces = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Translation:
    """One output. `score` is the search's: log-probability in nats over the length penalty."""

    text: str
    score: float
    finished: bool  # False: cut off at the longest length


def translate(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    sources: Sequence[Pieces] | EncodedText,
    settings: Evaluate,
    progress: bool = True,
) -> list[Translation]:
    """The best output for each sentence (its pieces, without EOS), in their order.

    An output has at most max_extra pieces more than its source, and max_length - 1. A longer source than that is
    cut there. Sentences of similar length are decoded together; who with whom changes no translation.

    On a CPU as many batches at once as torch has threads, which share batch_tokens, one thread to each: two at work
    on one batch wait for one another at every operator.
    """
    device, longest = model.embedding.weight.device, model.config.max_length - 1
    lengths = np.array([min(len(sources[i]), longest) for i in range(len(sources))], dtype=np.int64)
    translations: list[Translation | None] = [None] * len(sources)
    num_workers = torch.get_num_threads() if device.type == "cpu" else 1
    batches = list(batches_by_length(lengths, max(1, settings.batch_tokens // num_workers)))

    def search(indices: np.ndarray) -> list[list[Hypothesis]]:
        src = _pad([sources[i][: lengths[i]] for i in indices])
        max_lengths = torch.from_numpy(lengths[indices] + settings.max_extra).clamp(max=longest)
        with torch.inference_mode():
            decoder = model.start(src.to(device))
        return beam_search(decoder, max_lengths.to(device), beam=settings.beam, alpha=settings.alpha, num_best=1)

    with (
        tqdm(total=len(sources), desc="translating", unit=" sentences", disable=not progress) as bar,
        workers_of_one_thread(num_workers) as pool,
    ):
        for indices, found in zip(batches, pool.map(search, batches), strict=True):
            for i, [best] in zip(indices, found, strict=True):
                translations[i] = as_text(tokenizer, best)
            bar.update(len(indices))
    return [translation for translation in translations if translation is not None]


@contextmanager
def workers_of_one_thread(num_workers: int) -> Iterator[ThreadPoolExecutor]:
    """In whose calls an operator of torch uses one thread."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # other threads may have followed the workers


def as_text(tokenizer: "SentencePieceProcessor", best: Hypothesis) -> Translation:
    """On one line, though byte pieces can spell a line break."""
    return Translation(" ".join(tokenizer.decode(best.tokens).split()), best.score, best.finished)


def batches_by_length(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of sentences of similar length, longest first, at most `batch_tokens` positions when padded, EOS
    counted. A single sentence may be longer. `lengths` are without EOS."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // (int(lengths[order[start]]) + 1))
        yield order[start : start + size]
        start += size


def _pad(sentences: Sequence[Pieces]) -> Tensor:
    padded = torch.full((len(sentences), max(map(len, sentences)) + 1), PAD)
    for row, sentence in zip(padded, sentences, strict=True):
        row[: len(sentence)] = torch.from_numpy(np.asarray(sentence, dtype=np.int64))
        row[len(sentence)] = EOS
    return padded
