"""The sizes of a Transformer, and every check of them."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

PAD, UNK, BOS, EOS = 0, 1, 2, 3
"""The first four entries of every vocabulary: padding, unknown, begin and end of sentence."""

MAX_RELATIVE_DISTANCE = 16
"""Relative positions: offsets beyond this share one vector (Shaw et al. 2018, section 3.2; k of their base model)."""

Positions = Literal["sinusoidal", "learned", "none", "relative", "rotary", "alibi"]
Norm = Literal["post", "pre"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Table 3's columns, in the paper's symbols; all are independent of one another.

    Raises ValueError with the field's name, its value and what is allowed.
    """

    vocab_size: int
    num_layers: int  # N, in the encoder and in the decoder
    d_model: int
    d_ff: int
    num_heads: int  # h
    d_k: int  # of one head's queries and keys
    d_v: int  # of one head's values
    dropout: float  # P_drop
    positions: Positions
    norm: Norm  # post: LayerNorm(x + Sublayer(x)), the paper; pre: x + Sublayer(LayerNorm(x))
    max_length: int  # positions of one sentence, end-of-sentence counted

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():  # resolved, even if annotations are strings
            value = getattr(self, name)
            if kind is int and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        for name, allowed in (("positions", get_args(Positions)), ("norm", get_args(Norm))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.vocab_size <= EOS + 1:
            raise ValueError(f"vocab_size must be > {EOS + 1}, the number of reserved tokens, got {self.vocab_size}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model is {self.d_model}: sinusoidal positions need an even number")
        if self.positions == "rotary" and self.d_k % 2:
            raise ValueError(f"d_k is {self.d_k}: rotary positions need an even number")
