"""The Transformer, in the order of section 3 of the paper, from Figure 1 down to its parts.

The axes of shapes are batch, src and tgt (positions in a sentence), heads, d_model, d_k, d_v and vocab. True in a
mask means "attend". cpu/ has versions of some operations that are faster on CPUs; kv_cache.py has the decoder for
beam search.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import MAX_RELATIVE_DISTANCE, PAD, Positions, TransformerConfig
from model.cpu.attention import scaled_dot_product_attention
from model.cpu.dropout import dropout
from model.cpu.matmul import Linear, linear


class Transformer(nn.Module):
    """The encoder-decoder of Figure 1.

    A sentence ends in EOS, followed by PAD. The decoder's input is the target shifted right by one position, with BOS
    in front. Padding of the target needs no mask: it follows all tokens, and the decoder never looks ahead.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        # With norm "post", the output of the last layer is already normalised; with "pre", it is not.
        self.encoder_norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """Tokens [batch, src], [batch, tgt] -> the decoder's output [batch, tgt, d_model], the input of `logits`."""
        memory, attend_mask = self.encode(src)
        x = self.embedding(tgt_in)  # [batch, tgt, d_model]
        for layer in self.decoder:
            x = layer(x, memory, attend_mask)
        return self.decoder_norm(x)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [batch, src] -> the encoder's output [batch, src, d_model], and its mask [batch, 1, 1, src]."""
        attend_mask = (src != PAD)[:, None, None, :]
        x = self.embedding(src)  # [batch, src, d_model]
        for layer in self.encoder:
            x = layer(x, attend_mask)
        return self.encoder_norm(x), attend_mask

    def logits(self, x: Tensor) -> Tensor:
        """The pre-softmax projection, with the embedding matrix (section 3.4): [..., d_model] -> [..., vocab]."""
        return linear(x, self.embedding.weight)


# --- 3.1 Encoder and decoder stacks


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward (Figure 1, left): [batch, src, d_model] -> the same shape."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(c.d_model, c.num_heads, c.d_k, c.d_v, c.positions)
        self.feed_forward = FeedForward(c.d_model, c.d_ff)
        self.attention_residual, self.feed_forward_residual = Residual(c), Residual(c)

    def forward(self, x: Tensor, attend_mask: Tensor) -> Tensor:
        q, k, v = self.self_attention.project_qkv(self.attention_residual.pre(x))
        x = self.attention_residual.post(x, self.self_attention(q, k, v, attend_mask))
        return self.feed_forward_residual.post(x, self.feed_forward(self.feed_forward_residual.pre(x)))


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the encoder's output, then feed-forward (Figure 1, right).

    [batch, tgt, d_model] -> the same shape. `memory` and `attend_mask` are from `Transformer.encode`.
    """

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(c.d_model, c.num_heads, c.d_k, c.d_v, c.positions)
        self.cross_attention = Attention(c.d_model, c.num_heads, c.d_k, c.d_v)
        self.feed_forward = FeedForward(c.d_model, c.d_ff)
        self.self_attention_residual, self.cross_attention_residual = Residual(c), Residual(c)
        self.feed_forward_residual = Residual(c)

    def forward(self, x: Tensor, memory: Tensor, attend_mask: Tensor) -> Tensor:
        q, k, v = self.self_attention.project_qkv(self.self_attention_residual.pre(x))
        x = self.self_attention_residual.post(x, self.self_attention(q, k, v, causal=True))
        q = self.cross_attention.project_q(self.cross_attention_residual.pre(x))
        k, v = self.cross_attention.project_kv(memory)
        x = self.cross_attention_residual.post(x, self.cross_attention(q, k, v, attend_mask))
        return self.feed_forward_residual.post(x, self.feed_forward(self.feed_forward_residual.pre(x)))


class Residual(nn.Module):
    """The residual connection around a sub-layer, with dropout on the sub-layer's output (section 5.4).

    Norm "post", the paper's: LayerNorm(x + Dropout(Sublayer(x))). Norm "pre": x + Dropout(Sublayer(LayerNorm(x))).
    The caller computes output = Sublayer(pre(x)) and then post(x, output).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm, self.is_pre, self.dropout = nn.LayerNorm(config.d_model), config.norm == "pre", config.dropout

    def pre(self, x: Tensor) -> Tensor:
        """The sub-layer's input, from the residual stream x."""
        return self.norm(x) if self.is_pre else x

    def post(self, x: Tensor, output: Tensor) -> Tensor:
        """The residual stream x, with the sub-layer's output added; norm "post" normalises the sum."""
        x = x + (dropout(output, self.dropout) if self.training else output)
        return x if self.is_pre else self.norm(x)


# --- 3.2 Attention


class Attention(nn.Module):
    """Multi-head attention (section 3.2.2, Figure 2): Concat(head_1, ..., head_h) W^O with
    head_i = softmax(Q W_i^Q (K W_i^K)^T / sqrt(d_k)) V W_i^V.

    As in the paper's formulas, the projections have no biases. The attention weights get no dropout. Position
    encodings that act inside attention ("rotary", "alibi" and "relative") are at the end of this file.
    """

    def __init__(self, d_model: int, num_heads: int, d_k: int, d_v: int, positions: Positions = "none") -> None:
        super().__init__()
        self.num_heads, self.d_k, self.d_v, self.positions = num_heads, d_k, d_v, positions
        self.split = [num_heads * d_k, num_heads * d_k, num_heads * d_v]
        self.w_qkv = nn.Parameter(torch.empty(sum(self.split), d_model))  # W^Q, W^K and W^V, stacked
        self.w_o = Linear(num_heads * d_v, d_model, bias=False)
        if positions == "relative":
            self.offset_keys = nn.Parameter(torch.empty(2 * MAX_RELATIVE_DISTANCE + 1, d_k))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (*self.w_qkv.split(self.split), self.w_o.weight):
            nn.init.xavier_uniform_(weight)
        if self.positions == "relative":
            nn.init.xavier_uniform_(self.offset_keys)

    def project_qkv(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [batch, heads, length, d_k] and values [batch, heads, length, d_v] of self-attention.

        x is [batch, length, d_model]; `first` is the position in the sentence of its first token.
        """
        q, k, v = linear(x, self.w_qkv).split(self.split, dim=-1)  # [batch, length, heads * d_k or d_v]
        q, k, v = self._split_heads(q), self._split_heads(k), self._split_heads(v)
        if self.positions == "rotary":
            cos, sin = rotary_angles(first, x.size(1), self.d_k, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def project_q(self, x: Tensor) -> Tensor:
        """Queries of attention to the encoder's output: [batch, tgt, d_model] -> [batch, heads, tgt, d_k]."""
        return self._split_heads(linear(x, self.w_qkv[: self.split[0]]))

    def project_kv(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [batch, heads, src, d_k] and values [batch, heads, src, d_v] of the encoder's output."""
        k, v = linear(memory, self.w_qkv[self.split[0] :]).split(self.split[1:], dim=-1)
        return self._split_heads(k), self._split_heads(v)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend_mask: Tensor | None = None,
        causal: bool = False,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Attend in each head, then join the heads' outputs and project them: [batch, queries, d_model].

        `attend_mask` broadcasts to [batch, heads, queries, keys]. With `causal`, query i attends to keys 0 to i. Use
        at most one of the two.

        `offset` is the position of the key minus that of the query, [queries, keys] or [batch, 1, 1, keys]. By
        default, queries and keys are at positions 0, 1, 2, ...
        """
        bias = self._position_bias(q, k, offset)
        if bias is not None:
            if causal:
                attend_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
            attend_mask = bias if attend_mask is None else bias.masked_fill(~attend_mask, -math.inf)
        x = scaled_dot_product_attention(
            q, k, v, attend_mask, causal and bias is None
        )  # [batch, heads, queries, d_v]
        return self.w_o(x.transpose(1, 2).flatten(2))  # [batch, queries, heads * d_v] -> [batch, queries, d_model]

    def _split_heads(self, x: Tensor) -> Tensor:
        """[batch, length, heads * d] -> [batch, heads, length, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _position_bias(self, q: Tensor, k: Tensor, offset: Tensor | None = None) -> Tensor | None:
        """The bias that the position encoding adds to the attention logits: None, [heads, queries, keys] or
        [batch, heads, queries, keys]."""
        if self.positions not in ("alibi", "relative"):
            return None
        if offset is None:
            position = torch.arange(k.size(2), device=q.device)
            offset = position - position[:, None]  # [queries, keys]
        if self.positions == "alibi":
            return alibi_bias(offset, self.num_heads, q.dtype)
        return relative_bias(q, self.offset_keys, offset)


# --- 3.3 Position-wise feed-forward networks


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 (equation 2)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = Linear(d_model, d_ff), Linear(d_ff, d_model)
        for layer in (self.w_1, self.w_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x)))


# --- 3.4 Embeddings and softmax


class Embedding(nn.Module):
    """Token embeddings times sqrt(d_model), plus positions (section 3.5), with dropout on the sum (section 5.4).

    One matrix serves the encoder, the decoder and the pre-softmax projection. Positions are added if they are
    "sinusoidal" or "learned".
    """

    positions: Tensor | None  # [max_length, d_model]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        nn.init.normal_(self.weight, std=config.d_model**-0.5)
        self.scale, self.dropout = math.sqrt(config.d_model), config.dropout
        self.max_length = config.max_length
        if config.positions == "learned":  # Table 3, row E
            self.positions = nn.Parameter(torch.empty(config.max_length, config.d_model))
            nn.init.normal_(self.positions, std=config.d_model**-0.5)
        elif config.positions == "sinusoidal":
            self.register_buffer("positions", sinusoids(config.max_length, config.d_model), persistent=False)
        else:
            self.register_parameter("positions", None)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens [batch, length] -> [batch, length, d_model]. `first` is the position of the first token.

        Raises ValueError if the sentence is longer than max_length.
        """
        last = first + tokens.size(1)
        if last > self.max_length:
            raise ValueError(f"a sentence has {last} tokens, model.max_length is {self.max_length}")
        x = F.embedding(tokens, self.weight) * self.scale
        if self.positions is not None:
            x = x + self.positions[first:last]
        return dropout(x, self.dropout) if self.training else x


# --- 3.5 Positional encoding


def sinusoids(length: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(a) and PE(pos, 2i+1) = cos(a), with a = pos / 10000^(2i/d_model): [length, d_model]."""
    angles = position_angles(torch.arange(length), d_model)  # [length, d_model / 2]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def position_angles(positions: Tensor, dim: int) -> Tensor:
    """pos / 10000^(2i/dim) for i = 0, ..., dim/2 - 1, in radians: [positions] -> [positions, dim / 2]."""
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    return positions[:, None] / 10_000**exponent


# --- Beyond the paper: position encodings that act inside self-attention


def rotary_angles(first: int, length: int, d_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `position_angles` for `length` positions from `first`: both [length, d_k / 2]."""
    angles = position_angles(torch.arange(first, first + length, device=device), d_k)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_(i + d_k/2)) of queries or keys by the angle of its position (Su et al. 2021, equation
    34): [batch, heads, length, d_k] -> the same shape.

    Su et al. pair neighbours, (x_2i, x_(2i + 1)). The difference is a fixed permutation of the rows of W^Q and W^K.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def alibi_bias(offset: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """-2^(-8i/h) |offset| for head i (Press et al. 2022): [queries, keys] -> [heads, queries, keys], or
    [batch, 1, 1, keys] -> [batch, heads, 1, keys].

    |offset| extends ALiBi to the encoder, which attends in both directions; Press et al. have only a decoder.
    """
    head = torch.arange(1, num_heads + 1, device=offset.device, dtype=dtype)
    return -torch.exp2(-8 * head / num_heads)[:, None, None] * offset.abs().to(dtype)


def relative_bias(q: Tensor, offset_keys: Tensor, offset: Tensor) -> Tensor:
    """q_i . a_(j-i) / sqrt(d_k) for query i and key j (Shaw et al. 2018, equation 5): [batch, heads, queries, keys].

    The vector a of each offset is learned (`offset_keys` [offsets, d_k]) and shared by the heads. Shaw et al. also
    have such vectors for the values. They are left out: they need the attention weights, which the fused kernel does
    not return, and Table 3 of Shaw et al. shows that they make no difference.
    """
    index = offset.clamp(-MAX_RELATIVE_DISTANCE, MAX_RELATIVE_DISTANCE) + MAX_RELATIVE_DISTANCE
    by_offset = q @ offset_keys.T.to(q.dtype) / math.sqrt(q.size(-1))  # [batch, heads, queries, offsets]
    return by_offset.gather(-1, index.expand(*by_offset.shape[:3], -1))
