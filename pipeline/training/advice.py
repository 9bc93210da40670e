"""Lines for the user about a corpus and a model that do not fit each other: before training and after it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model.transformer import Transformer
from pipeline.common.settings import Model
from pipeline.data.dataset import CorpusInfo, EncodedSplit

TOKENS_FOR_EACH = 100
"""How often each token of the vocabulary should occur in the training text: Gowda and May (2020), "Finding the
Optimal Vocabulary Size for Neural Machine Translation", take the largest vocabulary of which 95% do. Here it is the
mean over both languages, of which a third is still let pass: Multi30k's usual 10,000 have about 80."""
FEWEST_TOKENS_FOR_EACH = 30
MOST_PARAMETERS_FOR_EACH = 20
"""For each target token of the training text. On Multi30k, Wu et al. (2021) find tiny (6 for each) better than base
(over 100); a model of the usual size on IWSLT 2014 has about 10, the paper's base on WMT 2014 less than 1."""
WORSE = 0.05
"""Nats a token, 5% of the perplexity: more than two validations of a model that learns no more differ by."""
MUCH_EARLIER = 0.8
"""Of all steps. What patience waits for in a usual run is less."""


def size_advice(data: Path, model: Model) -> list[str]:
    """What to change before training if vocabulary or model are far too large for the encoded corpus in `data`; empty
    if they are not."""
    train, info = EncodedSplit.open(data, "train"), CorpusInfo.open(data)
    pairs, sides = len(train), (len(train.src.tokens), len(train.tgt.tokens))
    lines = []
    if sum(sides) < FEWEST_TOKENS_FOR_EACH * info.vocab_size:
        fitting = max(500, round(sum(sides) / TOKENS_FOR_EACH / 100) * 100)
        lines.append(
            f"a vocabulary of {info.vocab_size:,} is large for {pairs:,} pairs: a token occurs "
            f"{sum(sides) / info.vocab_size:.0f} times on average; try tokenize.vocab_size {fitting}"
        )
    with torch.device("meta"):  # no memory
        parameters = sum(p.numel() for p in Transformer(model.config(info.vocab_size)).parameters())
    if parameters > MOST_PARAMETERS_FOR_EACH * sides[1]:
        lines.append(
            f"{parameters:,} parameters are many for {pairs:,} pairs, {parameters / sides[1]:.0f} for each target "
            "token: the model will soon know them by heart; take a smaller model or vocabulary, raise model.dropout "
            "to 0.3 or more, and set train.patience"
        )
    return lines


def best_validation(curve: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The point with the least loss, the first of equals."""
    return min(curve, key=lambda point: point["valid_loss"])


def overfitting_advice(curve: Sequence[Mapping[str, float]]) -> str | None:
    """A line if the best validation was much earlier than the end and much better; None if it was not."""
    best, last = best_validation(curve), curve[-1]
    worse = last["valid_loss"] - best["valid_loss"]
    if worse < WORSE or best["step"] > MUCH_EARLIER * last["step"]:
        return None
    step = f"{best['step']:,.0f}"
    bleu = ""
    if "valid_bleu" in best and "valid_bleu" in last:
        bleu = f"; BLEU of the sample {best['valid_bleu']:.1f} and {last['valid_bleu']:.1f}"
    return (
        f"the best validation loss was at step {step} of {last['step']:,.0f} (perplexity "
        f"{_shown(best['valid_ppl'])} then, {_shown(last['valid_ppl'])} at the end{bleu}): the model overfits; lower "
        "train.max_steps, set train.patience, raise model.dropout, or take a smaller model or tokenize.vocab_size"
    )


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
