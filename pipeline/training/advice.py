"""Advice for the user, before and after training, if the model or vocabulary is too large for the corpus."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model.transformer import Transformer
from pipeline.common.settings import Model
from pipeline.data.dataset import CorpusInfo, EncodedSplit

TOKENS_FOR_EACH = 100
"""How often a token of the vocabulary should occur in the training text, as a mean over both languages.

Gowda and May (2020), "Finding the Optimal Vocabulary Size for Neural Machine Translation", recommend the largest
vocabulary of which 95% of the tokens occur this often."""
FEWEST_TOKENS_FOR_EACH = 30
"""Advice is given below this mean. Multi30k with its usual vocabulary of 10,000 has about 80."""
MOST_PARAMETERS_FOR_EACH = 20
"""Parameters per target token of the training text above which advice is given.

On Multi30k, Wu et al. (2021) find that tiny (6 per token) is better than base (over 100). A model of the usual size
on IWSLT 2014 has about 10, the paper's base on WMT 2014 less than 1."""
WORSE = 0.05
"""Nats per token, or 5% of the perplexity. Two validations of a converged model differ by less."""
MUCH_EARLIER = 0.8
"""A share of all steps. With usual values of train.patience, the best validation is later than this."""


def size_advice(data: Path, model: Model) -> list[str]:
    """Lines of advice if the vocabulary or the model is far too large for the encoded corpus in `data`, else []."""
    train, info = EncodedSplit.open(data, "train"), CorpusInfo.open(data)
    pairs, sides = len(train), (len(train.src.tokens), len(train.tgt.tokens))
    lines = []
    if sum(sides) < FEWEST_TOKENS_FOR_EACH * info.vocab_size:
        fitting = max(500, round(sum(sides) / TOKENS_FOR_EACH / 100) * 100)
        lines.append(
            f"a vocabulary of {info.vocab_size:,} is large for {pairs:,} pairs: a token occurs "
            f"{sum(sides) / info.vocab_size:.0f} times on average; try tokenize.vocab_size {fitting}"
        )
    with torch.device("meta"):  # allocates no memory
        parameters = sum(p.numel() for p in Transformer(model.config(info.vocab_size)).parameters())
    if parameters > MOST_PARAMETERS_FOR_EACH * sides[1]:
        lines.append(
            f"{parameters:,} parameters are many for {pairs:,} pairs ({parameters / sides[1]:.0f} per target token): "
            "the model will overfit soon; use a smaller model or vocabulary, raise model.dropout to 0.3 or more, and "
            "set train.patience"
        )
    return lines


def best_validation(curve: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The first point with the lowest validation loss."""
    return min(curve, key=lambda point: point["valid_loss"])


def overfitting_advice(curve: Sequence[Mapping[str, float]]) -> str | None:
    """A line of advice if the best validation was much earlier and much better than the last one, else None."""
    best, last = best_validation(curve), curve[-1]
    worse = last["valid_loss"] - best["valid_loss"]
    if worse < WORSE or best["step"] > MUCH_EARLIER * last["step"]:
        return None
    step = f"{best['step']:,.0f}"
    bleu = ""
    if "valid_bleu" in best and "valid_bleu" in last:
        bleu = f"; sample BLEU {best['valid_bleu']:.1f} and {last['valid_bleu']:.1f}"
    return (
        f"the best validation loss was at step {step} of {last['step']:,.0f} (perplexity "
        f"{_shown(best['valid_ppl'])} there, {_shown(last['valid_ppl'])} at the end{bleu}): the model overfits; "
        "lower train.max_steps, set train.patience, raise model.dropout, or use a smaller model or "
        "tokenize.vocab_size"
    )


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
