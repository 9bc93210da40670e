"""Pieces to text by beam search (section 6.1), in batches: what evaluation and a served model share."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from model.decoding import Hypothesis, beam_search
from model.kv_cache import BeamKVCache
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.data.bucketing import pad, search_batches
from pipeline.data.dataset import EncodedText

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Pieces = Sequence[int] | np.ndarray
LEAST_WORK = 1 << 15
"""Positions times d_model of a batch below which two threads at half a batch each take longer than one at the whole:
most of what they do is to start operators."""


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

    An output has at most max_extra pieces more than its source, and never more than max_length - 1; a source longer
    than max_length - 1 is cut. Sentences of similar length are decoded together; with whom changes no translation.

    On a CPU, as many batches are searched at once as torch has threads; they share batch_tokens, and each has a
    thread to itself: two at work on one batch would wait for one another at every operator.
    """
    device, longest = model.embedding.weight.device, model.config.max_length - 1
    lengths = np.array([min(len(sources[i]), longest) for i in range(len(sources))], dtype=np.int64)
    translations: list[Translation | None] = [None] * len(sources)
    num_workers = torch.get_num_threads() if device.type == "cpu" else 1
    batch_tokens, least = max(1, settings.batch_tokens // num_workers), LEAST_WORK // model.config.d_model
    batches = search_batches(lengths, batch_tokens, settings.max_extra, num_workers, least)

    def search(indices: np.ndarray) -> list[list[Hypothesis]]:
        tokens = [np.asarray(sources[i][: lengths[i]], dtype=np.int64) for i in indices]
        src = pad(np.concatenate(tokens), lengths[indices])
        max_lengths = torch.from_numpy(lengths[indices] + settings.max_extra).clamp(max=longest)
        with torch.inference_mode():
            decoder = BeamKVCache(model, src.to(device))
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
