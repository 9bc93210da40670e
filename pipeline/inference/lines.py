"""Translate lines of text, for the command `translate` and for a served model."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.common.text import is_blank
from pipeline.inference.translate import Translation, engine_of, search_all

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

BATCH_TOKENS = 8192
"""The number of source tokens, padding included, in a batch. It changes memory and speed, but no translation."""
SENTENCE_END = re.compile(
    r"(?<![.!?…])[.!?…]++[\"'”“’‘»«)\]]*+\s++(?=\S)|(?<![。！？])[。！？]++[」』”’]*+\s*+(?=\S)"
)
"""Where a line that is too long is split, unless a lower-case letter follows, as after an abbreviation."""


@dataclass(frozen=True)
class Part:
    """A part of a line that is translated as one sentence: its tokens, and the separator to the next part."""

    tokens: np.ndarray
    separator: str


class LineTranslator:
    """Translates lines of text by beam search with these settings, and returns the `num_best` best for each.

    A line without a visible character has no translation. A line with more tokens than the model takes is split at
    the ends of sentences, and a sentence that is still too long is cut. Then the translations of its sentences are
    joined by rank (the best with the best, and so on), and their scores are added.
    """

    def __init__(
        self, model: Transformer, tokenizer: "SentencePieceProcessor", settings: Evaluate, num_best: int = 1
    ) -> None:
        self._tokenizer = tokenizer
        self._engine = engine_of(model, tokenizer, settings, num_best)
        self._longest = model.config.max_length - 1

    def __call__(self, lines: Sequence[str], log: Callable[[int, str], object]) -> list[list[Translation]]:
        """Return the translations of each line, best first. Calls `log(index, message)` for each line that is too
        long."""
        parts = [self._parts(line, partial(log, index)) for index, line in enumerate(lines)]
        found = iter(
            search_all(self._engine, self._tokenizer, [part.tokens for of_line in parts for part in of_line], False)
        )
        return [_together([(part, next(found)) for part in of_line]) for of_line in parts]

    def _parts(self, line: str, log: Callable[[str], object]) -> list[Part]:
        if is_blank(line):
            return []
        tokens = self._tokenizer.encode(line)
        if len(tokens) <= self._longest:
            return [Part(np.array(tokens, np.int64), "")]
        sentences = _sentences(line)
        encoded = [self._tokenizer.encode(sentence) for sentence, _ in sentences]
        left_out = sum(max(0, len(tokens) - self._longest) for tokens in encoded)
        message = f"has {len(tokens)} tokens, more than the model's {self._longest}: "
        message += f"translated in {len(sentences)} parts" if len(sentences) > 1 else "cut"
        if left_out:
            message += f", {left_out} tokens are left out"
        log(message)
        return [
            Part(np.array(tokens[: self._longest], np.int64), separator)
            for tokens, (_, separator) in zip(encoded, sentences, strict=True)
        ]


def _sentences(line: str) -> list[tuple[str, str]]:
    """Return each sentence and the separator after its translation: a space if white space follows the sentence."""
    found, start = [], 0
    for end in SENTENCE_END.finditer(line):
        if not line[end.end()].islower():
            found.append((line[start : end.end()].rstrip(), " " if end.group()[-1].isspace() else ""))
            start = end.end()
    return [*found, (line[start:], "")]


def _together(parts: list[tuple[Part, list[Translation]]]) -> list[Translation]:
    """Join the translations of the parts by rank. A part with fewer translations repeats its last one."""
    if not parts:
        return []
    if len(parts) == 1:
        return parts[0][1]
    together = []
    for rank in range(max(len(found) for _, found in parts)):
        chosen = [found[min(rank, len(found) - 1)] for _, found in parts]
        text = "".join(best.text + part.separator for best, (part, _) in zip(chosen, parts, strict=True))
        together.append(
            Translation(
                " ".join(text.split()), sum(best.score for best in chosen), all(best.finished for best in chosen)
            )
        )
    return together
