"""Translate token sequences to text by beam search (section 6.1 of the paper), in batches.

`translate` cuts the sources, groups them by length, lets an engine search each batch, and decodes the outputs. The
engine is in torch_engine.py or ctranslate2_engine.py. To translate text to text, see lines.py.
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
    """One output. `score` is its log-probability in nats divided by the length penalty."""

    text: str
    score: float
    finished: bool  # False: cut off at the maximum length


class Engine(Protocol):
    """A beam search. Sources have at most model.max_length - 1 tokens, EOS not counted."""

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Group sources with these lengths into batches: arrays of indices, with each source once."""

    def workers(self) -> AbstractContextManager[ThreadPoolExecutor]:
        """The threads that call `search` on different batches at the same time."""

    def search(self, sources: list[np.ndarray]) -> list[list[Hypothesis]]:
        """Return at least one output for each source of a batch, best first. Called in the workers."""


def translate(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    sources: Sequence[Sequence[int] | np.ndarray] | EncodedText,
    settings: Evaluate,
    progress: bool = True,
    title: str = "translating",
    engine: Engine | None = None,
) -> list[Translation]:
    """Return the best output for each source (the tokens of one sentence, without EOS), in the same order.

    An output has at most max_extra tokens more than its source, and at most max_length - 1. A source longer than
    max_length - 1 is cut. Sentences of similar length are decoded together, which changes no translation. `engine`:
    to translate several times, pass an engine made by `engine_of` from the same model and settings; None makes one.
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
    """Return for each source all outputs of the engine, best first."""
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
    """Make the engine that `settings.engine` names. It returns the `num_best` best outputs, or fewer if the search
    finds fewer."""
    if settings.engine == "torch":
        return TorchEngine(model, settings, num_best)
    # A late import, because a served model does not need CTranslate2.
    from pipeline.inference.ctranslate2_engine import CTranslate2Engine

    return CTranslate2Engine(model, tokenizer, settings, num_best)


def _as_text(tokenizer: "SentencePieceProcessor", best: Hypothesis) -> Translation:
    """Decode to one line of text: byte tokens can spell a line break."""
    return Translation(" ".join(tokenizer.decode(best.tokens).split()), best.score, best.finished)
