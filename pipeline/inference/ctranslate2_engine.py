"""Beam search by CTranslate2: faster on CPUs than the search in torch, with three different rules."""

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
"""The weights' format for each value of evaluate.engine."""
SEARCH_PATIENCE = 2
"""A search ends when SEARCH_PATIENCE * beam outputs have finished. A larger value is slower and gives more outputs
that equal torch's; with 2, nearly all are equal."""


class CTranslate2Engine:
    """A pipeline.inference.translate.Engine that runs a temporary export of the model.

    It searches as many batches at once as torch has threads, with one thread each, because two threads on one batch
    take longer. The batches share batch_tokens. A batch has sentences of one length, because CTranslate2 has one
    limit for all outputs of a batch.

    With float32 the outputs nearly always equal those of model.decoding.beam_search: limits and length penalty are
    the same. Ties between equally probable continuations may be broken differently, and three rules differ:

    - A finished output counts if it is among the first `beam` continuations of a step; in ours, among the first
      2 * beam. A model that has not learned to end its outputs has more of them cut off.
    - A search ends when SEARCH_PATIENCE * beam outputs have finished; ours ends when no other output can score
      better. If more outputs finish in a step, or the limit cuts some off, only that many are ranked: the first by
      log_prob / |Y|^alpha.
    - PAD and BOS are excluded from the softmax; ours only never chooses them. So every token's log-probability is
      higher by -ln(1 - p(PAD) - p(BOS)), about 1e-5 for a trained model.

    int8 rounds the computation, so another output may be the most probable.
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
            # In this thread, CTranslate2 has set torch's number of threads to its intra_threads.
            torch.set_num_threads(self._num_workers)

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        batch_tokens = max(1, self._settings.batch_tokens // self._num_workers)
        return search_batches_of_one_length(lengths, batch_tokens, self._settings.max_extra)

    def workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_workers)

    def search(self, sources: list[np.ndarray]) -> list[list[Hypothesis]]:
        """Return the best outputs for each source; all sources must have one length."""
        length = len(sources[0])
        if length == 0:
            return [self._of_empty_source] * len(sources)
        limit = min(length + self._settings.max_extra, self._model.config.max_length - 1)  # of an output, without EOS
        found = self._translate(sources, limit + 1)
        # An unfinished output has limit + 1 tokens, the last in the place of EOS: search it again with `limit`.
        cut = [i for i, best in enumerate(found) if not best[0].finished]
        for i, best in zip(cut, self._translate([sources[i] for i in cut], limit), strict=True):
            found[i] = best
        return found

    @cached_property
    def _of_empty_source(self) -> list[Hypothesis]:
        """Searched by torch, because CTranslate2 does not run the model on an empty source."""
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
            max_input_length=0,  # do not cut
            min_decoding_length=0,
            max_decoding_length=max_tokens,
            return_end_token=True,
            return_scores=True,
        )
        return [self._ranked(list(map(self._hypothesis, result.hypotheses, result.scores))) for result in results]

    def _ranked(self, found: list[Hypothesis]) -> list[Hypothesis]:
        """The `num_best` best, ranked as by model.decoding.beam_search: unfinished ones only if none has finished."""
        finished = [hypothesis for hypothesis in found if hypothesis.finished]
        return sorted(finished or found, key=lambda best: best.score, reverse=True)[: self._num_best]

    def _hypothesis(self, output: list[str], score: float) -> Hypothesis:
        """Convert CTranslate2's `score`, log_prob / |Y|^alpha, to ours."""
        log_prob = score * len(output) ** self._settings.alpha
        score = log_prob / self._penalties[len(output)]
        tokens = [self._tokens[piece] for piece in output]
        finished = tokens[-1] == EOS
        return Hypothesis(tokens[:-1] if finished else tokens, log_prob, score, finished)
