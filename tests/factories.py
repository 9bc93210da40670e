"""What many tests build: sizes of a Transformer, a model with random weights, sentences of random tokens."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.config import BOS, EOS, PAD, TransformerConfig
from model.transformer import Transformer

SMALL = TransformerConfig(
    vocab_size=23, num_layers=2, d_model=26, d_ff=17, num_heads=3, d_k=10, d_v=7,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=41,
)  # fmt: skip
"""Every size another, so that no two can be confused unseen."""
BASE = TransformerConfig(
    vocab_size=37_000, num_layers=6, d_model=512, d_ff=2048, num_heads=8, d_k=64, d_v=64,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=1024,
)  # fmt: skip
"""The paper's base model (Table 3)."""


def config(**changes: Any) -> TransformerConfig:
    """SMALL with these fields changed."""
    return replace(SMALL, **changes)


def build(config: TransformerConfig = SMALL, seed: int = 1) -> Transformer:
    """A model with random weights, for evaluation."""
    torch.manual_seed(seed)
    return Transformer(config).eval()


def sentences(lengths: list[int], vocab_size: int = 23, seed: int = 2) -> Tensor:
    """Random tokens [len(lengths), longest], EOS at each end, PAD behind."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(EOS + 1, vocab_size, (length - 1,), generator=generator) for length in lengths]
    rows = [torch.cat((row, torch.tensor([EOS]))) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def shifted(tgt: Tensor) -> Tensor:
    """The decoder's input for these targets."""
    return torch.cat((torch.full((len(tgt), 1), BOS), tgt[:, :-1].masked_fill(tgt[:, :-1] == EOS, PAD)), dim=1)
