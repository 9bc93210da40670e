"""What pipeline/inference/translate.py does, by CTranslate2: on CPUs, faster, by its own beam search."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import ctranslate2
import numpy as np
import torch
from tqdm import tqdm

from model.config import BOS, EOS, PAD
from model.decoding import Hypothesis, length_penalty
from model.transformer import Transformer
from pipeline.common.settings import Evaluate
from pipeline.data.bucketing import search_batches_of_one_length
from pipeline.data.dataset import EncodedText
from pipeline.inference.ctranslate2_export import Quantization, write_export
from pipeline.inference.translate import Pieces, Translation, as_text, translate

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

QUANTIZATION: dict[str, Quantization] = {"ctranslate2": "float32", "ctranslate2-int8": "int8"}
"""By evaluate.engine."""
PATIENCE = 2
"""A search ends with PATIENCE * beam finished outputs: the more, the slower, and the more of them are those of torch;
with 2, nearly all are."""


def translate_ctranslate2(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    sources: Sequence[Pieces] | EncodedText,
    settings: Evaluate,
    progress: bool = True,
) -> list[Translation]:
    """As pipeline.inference.translate.translate, by a temporary export of the model; `Search` says what can differ.

    As many batches at once as torch has threads, which share batch_tokens, one thread to each: two at work on one
    batch take longer. A batch has sentences of one length, for CTranslate2 has one limit for all outputs of a batch.
    """
    longest = model.config.max_length - 1
    lengths = np.array([min(len(sources[i]), longest) for i in range(len(sources))], dtype=np.int64)
    translations: list[Translation | None] = [None] * len(sources)
    threads = torch.get_num_threads()
    search = Search(model, tokenizer, settings, threads)
    batch_tokens = max(1, settings.batch_tokens // threads)
    batches = [
        indices
        for indices in search_batches_of_one_length(lengths, batch_tokens, settings.max_extra)
        if lengths[indices[0]] > 0
    ]

    def found(indices: np.ndarray) -> list[Hypothesis]:
        length = int(lengths[indices[0]])
        return search([sources[i][:length] for i in indices], min(length + settings.max_extra, longest))

    with (
        tqdm(total=len(sources), desc="translating", unit=" sentences", disable=not progress) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for indices, outputs in zip(batches, pool.map(found, batches), strict=True):
            for i, best in zip(indices, outputs, strict=True):
                translations[i] = as_text(tokenizer, best)
            bar.update(len(indices))
        empty = np.flatnonzero(lengths == 0)  # CTranslate2 does not ask the model what it makes of nothing
        by_torch = translate(model, tokenizer, [[]] * len(empty), settings, progress=False)
        for i, translation in zip(empty, by_torch, strict=True):
            translations[i] = translation
        bar.update(len(empty))
    return [translation for translation in translations if translation is not None]


class Search:
    """Sources to their best outputs, from several threads at once.

    With float32 nearly always those of model.decoding.beam_search: limits and length penalty are the same. Three
    rules are not, and which of equally probable continuations comes first:

    - an output that ends counts when it is among the first `beam` continuations of a step, ours among 2 * beam. A
      model that has not learned to end its outputs has more of them cut off;
    - a search ends with PATIENCE * beam finished outputs, ours when no other can come to score better. If there are
      more, or some that the limit cuts off, only so many are ranked: the first by log_prob / |Y|^alpha;
    - PAD and BOS have no share in the softmax, ours just never takes them: every piece's log-probability is higher
      by -ln(1 - p(PAD) - p(BOS)), some 1e-5 for a trained model.

    int8 rounds what the model computes, so that others may be more probable.
    """

    def __init__(
        self, model: Transformer, tokenizer: "SentencePieceProcessor", settings: Evaluate, num_batches: int
    ) -> None:
        """`num_batches`: how many there may be at once."""
        self.pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.beam, self.alpha = settings.beam, settings.alpha
        self.penalties = length_penalty(torch.arange(model.config.max_length + 1), self.alpha).tolist()
        with tempfile.TemporaryDirectory() as folder:
            write_export(model, tokenizer, Path(folder), QUANTIZATION[settings.engine])
            threads = torch.get_num_threads()
            self.translator = ctranslate2.Translator(folder, "cpu", inter_threads=num_batches, intra_threads=1)
            torch.set_num_threads(threads)  # in this thread, CTranslate2 has set torch's to its intra_threads

    def __call__(self, sources: Sequence[Pieces], limit: int) -> list[Hypothesis]:
        """Of sources with a piece or more; `limit` is the most pieces of an output, EOS not counted."""
        found = self._search(sources, limit + 1)
        cut = [i for i, best in enumerate(found) if not best.finished]  # it has a piece too many, where EOS could be
        for i, best in zip(cut, self._search([sources[i] for i in cut], limit), strict=True):
            found[i] = best
        return found

    def _search(self, sources: Sequence[Pieces], max_pieces: int) -> list[Hypothesis]:
        results = self.translator.translate_batch(
            [[self.pieces[piece] for piece in source] for source in sources],
            beam_size=self.beam,
            patience=PATIENCE,
            num_hypotheses=1 if self.beam == 1 else PATIENCE * self.beam,
            length_penalty=self.alpha,
            suppress_sequences=[[self.pieces[PAD]], [self.pieces[BOS]]],
            max_input_length=0,  # as it is
            min_decoding_length=0,
            max_decoding_length=max_pieces,
            return_end_token=True,
            return_scores=True,
        )
        return [
            max(map(self._hypothesis, result.hypotheses, result.scores), key=lambda best: (best.finished, best.score))
            for result in results
        ]

    def _hypothesis(self, output: list[str], score: float) -> Hypothesis:
        """`score` is log_prob / |Y|^alpha."""
        log_prob = score * len(output) ** self.alpha
        score = log_prob / self.penalties[len(output)]
        tokens = [self.ids[piece] for piece in output]
        finished = tokens[-1] == EOS
        return Hypothesis(tokens[:-1] if finished else tokens, log_prob, score, finished)
