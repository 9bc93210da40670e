"""Tokens to text by beam search (section 6.1), in batches: what evaluation and a served model share.

`translate` is the whole way: cut sources, group them by length, let an engine search each group, decode. An engine
is pipeline/inference/torch_engine.py or ctranslate2_engine.py. Text to text is pipeline/inference/lines.py.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from tqdm import tqdm

from model.decoding import Hypothesis
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.data.dataset import EncodedText
from pipeline.inference.torch_engine import TorchEngine

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True)
class Translation:
    """One output. `score` is the search's: log-probability in nats over the length penalty."""

    text: str
    score: float
    finished: bool  # False: cut off at the longest length


class Engine(Protocol):
    """A beam search. Sources have at most model.max_length - 1 tokens, EOS not counted."""

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Which sources, of these lengths, are searched together: arrays of indices, each source once."""

    def workers(self) -> AbstractContextManager[ThreadPoolExecutor]:
        """The threads that search batches at the same time."""

    def search(self, sources: list[np.ndarray]) -> list[list[Hypothesis]]:
        """The best outputs for each source of a batch, best first, at least one; called by the workers."""


def translate(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    sources: Sequence[Sequence[int] | np.ndarray] | EncodedText,
    settings: Evaluate,
    progress: bool = True,
    title: str = "translating",
    engine: Engine | None = None,
) -> list[Translation]:
    """The best output for each sentence (its tokens, without EOS), in their order, by the engine of the settings.

    An output has at most max_extra tokens more than its source, and never more than max_length - 1; a source longer
    than max_length - 1 is cut. Sentences of similar length are decoded together; with whom changes no translation.
    `engine` is one that `engine_of` has made of the same, for several calls.
    """
    longest = model.config.max_length - 1
    cut = [np.asarray(sources[i][:longest], dtype=np.int64) for i in range(len(sources))]
    found = search_all(engine or engine_of(model, tokenizer, settings), tokenizer, cut, progress, title)
    return [best for [best] in found]


def search_all(
    engine: Engine,
    tokenizer: "SentencePieceProcessor",
    sources: Sequence[np.ndarray],
    progress: bool = True,
    title: str = "translating",
) -> list[list[Translation]]:
    """The best outputs for each source, as many as the engine gives, best first."""
    batches = engine.batches(np.array([len(source) for source in sources], dtype=np.int64))
    translations: list[list[Translation]] = [[] for _ in sources]
    with (
        tqdm(total=len(sources), desc=title, unit=" sentences", disable=not progress) as bar,
        engine.workers() as pool,
    ):
        outputs = pool.map(engine.search, [[sources[i] for i in indices] for indices in batches])
        for indices, found in zip(batches, outputs, strict=True):
            for i, best in zip(indices, found, strict=True):
                translations[i] = [_as_text(tokenizer, hypothesis) for hypothesis in best]
            bar.update(len(indices))
    return translations


def engine_of(
    model: Transformer, tokenizer: "SentencePieceProcessor", settings: Evaluate, num_best: int = 1
) -> Engine:
    """The engine of the settings, which gives the `num_best` best outputs, fewer if a search finds fewer."""
    if settings.engine == "torch":
        return TorchEngine(model, settings, num_best)
    from pipeline.inference.ctranslate2_engine import (
        CTranslate2Engine,  # here: a served model does without CTranslate2
    )

    return CTranslate2Engine(model, tokenizer, settings, num_best)


def _as_text(tokenizer: "SentencePieceProcessor", best: Hypothesis) -> Translation:
    """On one line, though byte tokens can spell a line break."""
    return Translation(" ".join(tokenizer.decode(best.tokens).split()), best.score, best.finished)
