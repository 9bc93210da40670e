"""BLEU and chrF of a sample of the validation split, during training."""

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
"""Fixed, so that all runs score the same sentences and their curves can be compared."""


class SampleScorer:
    """Scores models on `train.bleu_sentences` pairs of the validation split. `root` is the folder that has data/.

    It uses greedy search in torch: its BLEU rises and falls with that of beam search, at a fraction of the cost. All
    other settings of the search are those of `evaluate`. Raises ValueError if the texts or the tokenizer are missing.
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
        """Return {"valid_bleu": ..., "valid_chrf": ...}. The model's training mode is restored."""
        from pipeline.inference.metrics import chrf, sacre_bleu  # a late import: the first step does not wait for it

        training = model.training
        translations = translate(model.eval(), self._tokenizer, self._sources, self._search, progress=False)
        model.train(training)
        outputs = [translation.text for translation in translations]
        return {
            "valid_bleu": sacre_bleu(outputs, self._references, self._tgt).value,
            "valid_chrf": chrf(outputs, self._references).value,
        }
