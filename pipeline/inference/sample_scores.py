"""BLEU and chrF of a sample of the validation split, while a model is being trained."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from model.transformer import Transformer
from pipeline.common.paths import TOKENIZER
from pipeline.common.settings import Settings
from pipeline.data.dataset import load_tokenizer
from pipeline.inference.split import read_split
from pipeline.inference.translate import translate

SAMPLE_SEED = 0
"""The same sentences in every run, so that the curves of two runs can be compared."""


class SampleScorer:
    """Scores models on `train.bleu_sentences` pairs of the validation split, in a folder with data/.

    By greedy search, whose BLEU rises and falls with that of `evaluate`, at a fraction of its cost; the other
    settings of the search are those of `evaluate`, on torch. Raises ValueError if text or tokenizer are not there.
    """

    def __init__(self, settings: Settings, root: Path) -> None:
        self._tokenizer = load_tokenizer(root / TOKENIZER)
        split = read_split("valid", settings.data.src, settings.data.tgt, root)
        order = np.random.default_rng(SAMPLE_SEED).permutation(len(split.references))
        sample = sorted(order[: settings.train.bleu_sentences].tolist())
        self._sources = [np.array(split.tokens.src[i]) for i in sample]
        self._tgt = split.tgt
        self._references = [split.references[i] for i in sample]
        self._search = replace(settings.evaluate, beam=1, engine="torch")

    def __call__(self, model: Transformer) -> dict[str, float]:
        """{"valid_bleu", "valid_chrf"}; the model is as before afterwards."""
        from pipeline.inference.metrics import chrf, sacre_bleu  # here: the first step does not wait for it

        training = model.training
        translations = translate(model.eval(), self._tokenizer, self._sources, self._search, progress=False)
        model.train(training)
        outputs = [translation.text for translation in translations]
        return {
            "valid_bleu": sacre_bleu(outputs, self._references, self._tgt).value,
            "valid_chrf": chrf(outputs, self._references).value,
        }
