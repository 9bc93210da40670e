"""The sizes of a Transformer, and their checks."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

PAD, UNK, BOS, EOS = 0, 1, 2, 3
"""The first four tokens of every vocabulary: padding, unknown, begin and end of sentence."""

MAX_RELATIVE_DISTANCE = 16
"""With relative positions, all larger offsets share one vector (k of the base model of Shaw et al. 2018)."""

Positions = Literal["sinusoidal", "learned", "none", "relative", "rotary", "alibi"]
Norm = Literal["post", "pre"]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The columns of Table 3, in the paper's symbols. Each is set on its own: d_k need not be d_model / num_heads.

    Raises ValueError that names the field, what is allowed and the value.
    """

    vocab_size: int
    num_layers: int  # N, in the encoder and in the decoder
    d_model: int
    d_ff: int
    num_heads: int  # h
    d_k: int  # width of a head's queries and keys
    d_v: int  # width of a head's values
    dropout: float  # P_drop
    positions: Positions
    norm: Norm  # post: LayerNorm(x + Sublayer(x)), the paper; pre: x + Sublayer(LayerNorm(x))
    max_length: int  # tokens of a sentence, EOS included

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
            raise ValueError(f"d_model must be even with sinusoidal positions, got {self.d_model}")
        if self.positions == "rotary" and self.d_k % 2:
            raise ValueError(f"d_k must be even with rotary positions, got {self.d_k}")
