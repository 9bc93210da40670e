"""Tokens to text by beam search (section 6.1), in batches: what evaluation and a served model share.

`translate` is the whole way: cut sources, group them by length, let an engine search each group, decode. An engine
is pipeline/inference/torch_engine.py or ctranslate2_engine.py.
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

    def search(self, sources: list[np.ndarray]) -> list[Hypothesis]:
        """The best output for each source of a batch; called by the workers."""


def translate(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    sources: Sequence[Sequence[int] | np.ndarray] | EncodedText,
    settings: Evaluate,
    progress: bool = True,
    title: str = "translating",
) -> list[Translation]:
    """The best output for each sentence (its tokens, without EOS), in their order, by the engine of the settings.

    An output has at most max_extra tokens more than its source, and never more than max_length - 1; a source longer
    than max_length - 1 is cut. Sentences of similar length are decoded together; with whom changes no translation.
    """
    engine = _engine(model, tokenizer, settings)
    longest = model.config.max_length - 1
    cut = [np.asarray(sources[i][:longest], dtype=np.int64) for i in range(len(sources))]
    batches = engine.batches(np.array([len(source) for source in cut], dtype=np.int64))
    translations: list[Translation | None] = [None] * len(cut)
    with (
        tqdm(total=len(cut), desc=title, unit=" sentences", disable=not progress) as bar,
        engine.workers() as pool,
    ):
        outputs = pool.map(engine.search, [[cut[i] for i in indices] for indices in batches])
        for indices, best in zip(batches, outputs, strict=True):
            for i, hypothesis in zip(indices, best, strict=True):
                translations[i] = _as_text(tokenizer, hypothesis)
            bar.update(len(indices))
    return [translation for translation in translations if translation is not None]


def _engine(model: Transformer, tokenizer: "SentencePieceProcessor", settings: Evaluate) -> Engine:
    if settings.engine == "torch":
        return TorchEngine(model, settings)
    from pipeline.inference.ctranslate2_engine import (
        CTranslate2Engine,  # here: a served model does without CTranslate2
    )

    return CTranslate2Engine(model, tokenizer, settings)


def _as_text(tokenizer: "SentencePieceProcessor", best: Hypothesis) -> Translation:
    """On one line, though byte pieces can spell a line break."""
    return Translation(" ".join(tokenizer.decode(best.tokens).split()), best.score, best.finished)
