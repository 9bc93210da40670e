"""Beam search by CTranslate2: on CPUs faster than ours, by rules of its own."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import ctranslate2
import numpy as np
import torch

from model.config import BOS, EOS, PAD
from model.decoding import Hypothesis, length_penalty
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.data.bucketing import search_batches_of_one_length
from pipeline.inference.ctranslate2_export import Quantization, write_export
from pipeline.inference.torch_engine import TorchEngine

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

QUANTIZATION: dict[str, Quantization] = {"ctranslate2": "float32", "ctranslate2-int8": "int8"}
"""By evaluate.engine."""
SEARCH_PATIENCE = 2
"""A search ends with SEARCH_PATIENCE * beam finished outputs: the more, the slower, and the more of them are those of
torch; with 2, nearly all are."""


class CTranslate2Engine:
    """A pipeline.inference.translate.Engine, by a temporary export of the model.

    As many batches at once as torch has threads, which share batch_tokens, one thread to each: two at work on one
    batch take longer. A batch has sentences of one length, for CTranslate2 has one limit for all outputs of a batch.

    With float32 the outputs are nearly always those of model.decoding.beam_search: limits and length penalty are the
    same. Three rules are not, and which of equally probable continuations comes first:

    - an output that ends counts when it is among the first `beam` continuations of a step, ours among 2 * beam. A
      model that has not learned to end its outputs has more of them cut off;
    - a search ends with SEARCH_PATIENCE * beam finished outputs, ours when no other can come to score better. If
      there are more, or some that the limit cuts off, only so many are ranked: the first by log_prob / |Y|^alpha;
    - PAD and BOS have no share in the softmax, ours just never takes them: every token's log-probability is higher
      by -ln(1 - p(PAD) - p(BOS)), some 1e-5 for a trained model.

    int8 rounds what the model computes, so that others may be more probable.
    """

    def __init__(
        self, model: Transformer, tokenizer: "SentencePieceProcessor", settings: Evaluate, num_best: int = 1
    ) -> None:
        self._model, self._settings, self._num_best = model, settings, num_best
        self._pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.get_piece_size())]
        self._tokens = {piece: token for token, piece in enumerate(self._pieces)}
        self._penalties = length_penalty(torch.arange(model.config.max_length + 1), settings.alpha).tolist()
        self._num_workers = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            write_export(model, tokenizer, Path(folder), QUANTIZATION[settings.engine])
            self._translator = ctranslate2.Translator(folder, "cpu", inter_threads=self._num_workers, intra_threads=1)
            torch.set_num_threads(
                self._num_workers
            )  # in this thread, CTranslate2 has set torch's to its intra_threads

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        batch_tokens = max(1, self._settings.batch_tokens // self._num_workers)
        return search_batches_of_one_length(lengths, batch_tokens, self._settings.max_extra)

    def workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_workers)

    def search(self, sources: list[np.ndarray]) -> list[list[Hypothesis]]:
        """`sources` have one length."""
        length = len(sources[0])
        if length == 0:
            return [self._of_empty_source] * len(sources)
        limit = min(length + self._settings.max_extra, self._model.config.max_length - 1)  # of an output, without EOS
        found = self._translate(sources, limit + 1)
        cut = [i for i, best in enumerate(found) if not best[0].finished]  # a token too many, where EOS could be
        for i, best in zip(cut, self._translate([sources[i] for i in cut], limit), strict=True):
            found[i] = best
        return found

    @cached_property
    def _of_empty_source(self) -> list[Hypothesis]:
        """By the other engine: CTranslate2 does not ask the model for one."""
        [best] = TorchEngine(self._model, self._settings, self._num_best).search([np.empty(0, np.int64)])
        return best

    def _translate(self, sources: list[np.ndarray], max_tokens: int) -> list[list[Hypothesis]]:
        beam = self._settings.beam
        results = self._translator.translate_batch(
            [[self._pieces[token] for token in source] for source in sources],
            beam_size=beam,
            patience=SEARCH_PATIENCE,
            num_hypotheses=1 if beam == 1 else SEARCH_PATIENCE * beam,
            length_penalty=self._settings.alpha,
            suppress_sequences=[[self._pieces[PAD]], [self._pieces[BOS]]],
            max_input_length=0,  # as it is
            min_decoding_length=0,
            max_decoding_length=max_tokens,
            return_end_token=True,
            return_scores=True,
        )
        return [self._ranked(list(map(self._hypothesis, result.hypotheses, result.scores))) for result in results]

    def _ranked(self, found: list[Hypothesis]) -> list[Hypothesis]:
        """The best, as model.decoding.beam_search ranks them: what is cut off counts if all is."""
        finished = [hypothesis for hypothesis in found if hypothesis.finished]
        return sorted(finished or found, key=lambda best: best.score, reverse=True)[: self._num_best]

    def _hypothesis(self, output: list[str], score: float) -> Hypothesis:
        """`score` is log_prob / |Y|^alpha."""
        log_prob = score * len(output) ** self._settings.alpha
        score = log_prob / self._penalties[len(output)]
        tokens = [self._tokens[piece] for piece in output]
        finished = tokens[-1] == EOS
        return Hypothesis(tokens[:-1] if finished else tokens, log_prob, score, finished)
