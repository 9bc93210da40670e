"""A trained model with the tokenizer that it was trained with, from one folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from model.transformer import Transformer
from pipeline.data.dataset import load_tokenizer
from pipeline.training.checkpoint import load_model

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def load_trained(folder: Path) -> tuple[Transformer, "SentencePieceProcessor"]:
    """What the train stage has written, verified. Raises ValueError that names what is missing or damaged."""
    model, tokenizer = load_model(folder), load_tokenizer(folder, "train")
    if tokenizer.get_piece_size() != model.config.vocab_size:
        raise ValueError(
            f"{folder} has a tokenizer of {tokenizer.get_piece_size()} tokens and a model of "
            f"{model.config.vocab_size}: run the train stage again"
        )
    return model, tokenizer
