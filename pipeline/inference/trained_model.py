"""Load a trained model and its tokenizer from one folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from model.transformer import Transformer
from pipeline.data.dataset import load_tokenizer
from pipeline.training.checkpoint import load_model

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def load_trained(folder: Path) -> tuple[Transformer, "SentencePieceProcessor"]:
    """Load and verify the model and tokenizer that the train stage wrote to `folder`.

    Raises ValueError, which names the file, if one is missing or damaged, or if the two do not match.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder, "train")
    if tokenizer.get_piece_size() != model.config.vocab_size:
        raise ValueError(
            f"{folder} has a tokenizer with {tokenizer.get_piece_size()} tokens, but a model with "
            f"{model.config.vocab_size}: run the train stage again"
        )
    return model, tokenizer
