"""What many tests build: sizes of a Transformer."""

from dataclasses import replace
from typing import Any

from model.config import TransformerConfig

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
