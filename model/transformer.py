"""The Transformer, in the order of section 3 of the paper.

Shapes in the comments: batch, src and tgt (positions of a sentence), heads, d_model, d_k, d_v, vocab;
`rows` are the hypotheses of a beam search, `sentences` their source sentences. A mask's True means "attend".
"""

import math
import threading
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import PAD, Positions, TransformerConfig
from model.cpu.matmul import Linear, linear

MAX_RELATIVE_DISTANCE = 16
"""Offsets beyond this share one vector (Shaw et al. 2018, section 3.2; their k for the base model)."""
MAX_UNFUSED_QUERIES = 256
"""On a CPU, sentences up to here keep their attention weights in memory, instead of using the fused kernel."""
POOL_STEPS = 6
"""Steps of decoding for which the pool of keys and values has room, before it is cleared: with more, there are more
dead keys to look at; with fewer, more copies."""


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d_k) + mask) V (section 3.2.1): [batch, heads, queries or keys, d_k or d_v].

    `mask`, if any, is True where to attend, or a bias, and broadcasts to [batch, heads, queries, keys]. torch's fused
    kernel spares the weights [queries, keys] their way through memory, which matters for long sentences; on a CPU it
    gains next to nothing from a second thread, where batched products of all heads do. With a thread to each
    micro-batch, both take as long on a CPU with AVX2; one with AVX-512 was not tried.
    """
    if q.device.type != "cpu" or q.size(2) > MAX_UNFUSED_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    batch, num_heads, num_queries, d_k = q.shape
    bias = q.new_zeros(1, 1, 1)
    if causal:
        mask = torch.ones(num_queries, k.size(2), dtype=torch.bool).tril()
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    if bias.dim() == 4:  # another for every sentence
        bias = bias.expand(batch, num_heads, -1, -1).flatten(0, 1)
    elif len(bias) > 1:  # for every head
        bias = bias.repeat(batch, 1, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [batch * heads, queries or keys, d_k or d_v]
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d_k**-0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (batch, num_heads))


class Attention(nn.Module):
    """Multi-head attention (sections 3.2.1 and 3.2.2, Figure 2): Concat(head_1..head_h) W^O with
    head_i = softmax(Q W_i^Q (K W_i^K)^T / sqrt(d_k)) V W_i^V; no biases, no dropout on the weights.

    The positions that act inside attention act here, on self-attention only:

    - rotary (Su et al. 2021): queries and keys are turned by angles that grow with their position;
    - alibi (Press et al. 2022): head i's logits lose 2^(-8i/h) |offset|, on both sides in the encoder;
    - relative (Shaw et al. 2018): query i gains q_i . a_(j-i) / sqrt(d_k) for key j, a learned vector a for each
      offset, shared by the heads. Their second term, on the values, is left out: their Table 3 finds that it
      changes nothing, and the weights that it needs never leave the fused kernel.
    """

    def __init__(self, d_model: int, num_heads: int, d_k: int, d_v: int, positions: Positions = "none") -> None:
        super().__init__()
        self.num_heads, self.d_k, self.d_v, self.positions = num_heads, d_k, d_v, positions
        self.split = [num_heads * d_k, num_heads * d_k, num_heads * d_v]
        self.w_qkv = nn.Parameter(torch.empty(sum(self.split), d_model))  # W^Q, W^K, W^V, one below the other
        self.w_o = Linear(num_heads * d_v, d_model, bias=False)
        if positions == "relative":
            self.offset_keys = nn.Parameter(torch.empty(2 * MAX_RELATIVE_DISTANCE + 1, d_k))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (*self.w_qkv.split(self.split), self.w_o.weight):
            nn.init.xavier_uniform_(weight)
        if self.positions == "relative":
            nn.init.xavier_uniform_(self.offset_keys)

    def queries_keys_values(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Of self-attention: [batch, heads, length, d_k, d_k and d_v]; x begins at position `first`."""
        q, k, v = linear(x, self.w_qkv).split(self.split, dim=-1)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.positions == "rotary":
            cos, sin = rotary_angles(first, x.size(1), self.d_k, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v

    def queries(self, x: Tensor) -> Tensor:
        """Of attention to the encoder's output."""
        return self._heads(linear(x, self.w_qkv[: self.split[0]]))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Of the encoder's output."""
        k, v = linear(memory, self.w_qkv[self.split[0] :]).split(self.split[1:], dim=-1)
        return self._heads(k), self._heads(v)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend_mask: Tensor | None = None,
        causal: bool = False,
        offset: Tensor | None = None,
    ) -> Tensor:
        """The heads' outputs, joined and projected: [batch, queries, d_model].

        `offset`: j - i, the positions of key and query, broadcasting to [batch, heads, queries, keys]; None: both
        have all positions, in order.
        """
        bias = self._position_bias(q, k, offset)
        if bias is not None:
            if causal:
                attend_mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
            attend_mask = bias if attend_mask is None else bias.masked_fill(~attend_mask, -math.inf)
        x = scaled_dot_product_attention(q, k, v, attend_mask, causal and bias is None)
        return self.w_o(x.transpose(1, 2).flatten(2))  # [batch, queries, heads * d_v] -> d_model

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _position_bias(self, q: Tensor, k: Tensor, offset: Tensor | None = None) -> Tensor | None:
        """What is added to the logits: [heads, queries, keys] or [batch, heads, queries, keys]."""
        if self.positions not in ("alibi", "relative"):
            return None
        if offset is None:
            position = torch.arange(k.size(2), device=q.device)
            offset = position - position[:, None]
        if self.positions == "alibi":
            head = torch.arange(1, self.num_heads + 1, device=q.device, dtype=q.dtype)
            return -torch.exp2(-8 * head / self.num_heads)[:, None, None] * offset.abs().to(q.dtype)
        offset = offset.clamp(-MAX_RELATIVE_DISTANCE, MAX_RELATIVE_DISTANCE) + MAX_RELATIVE_DISTANCE
        by_offset = q @ self.offset_keys.T.to(q.dtype) / math.sqrt(self.d_k)  # [batch, heads, queries, offsets]
        return by_offset.gather(-1, offset.expand(*by_offset.shape[:3], -1))


def rotary_angles(first: int, length: int, d_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position / 10000^(2i/d_k), from position `first`: [length, d_k / 2]."""
    angles = position_angles(torch.arange(first, first + length, device=device), d_k)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_(i + d_k/2)) by its angle (Su et al. 2021, equation 34, halves instead of
    neighbours: a fixed permutation of W^Q and W^K)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 (section 3.3)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_1, self.w_2 = Linear(d_model, d_ff), Linear(d_ff, d_model)
        for layer in (self.w_1, self.w_2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x)))


def position_angles(positions: Tensor, dim: int) -> Tensor:
    """position / 10000^(2i/dim) for i = 0 .. dim/2 - 1: [positions, dim / 2]."""
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    return positions[:, None] / 10_000**exponent


def sinusoids(length: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d_model)), PE(pos, 2i+1) = the cosine (section 3.5)."""
    angles = position_angles(torch.arange(length), d_model)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # [length, d_model]


class Embedding(nn.Module):
    """The matrix shared by both embeddings and the pre-softmax projection, times sqrt(d_model) (section 3.4),
    plus positions that are added (section 3.5), with dropout on the sum (section 5.4)."""

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
        """[batch, length] -> [batch, length, d_model]; the tokens begin at position `first`."""
        last = first + tokens.size(1)
        if last > self.max_length:
            raise ValueError(f"a sentence of {last} pieces: model.max_length is {self.max_length}")
        x = F.embedding(tokens, self.weight) * self.scale
        if self.positions is not None:
            x = x + self.positions[first:last]
        return dropout(x, self.dropout) if self.training else x


class _DropoutRandom(threading.local):
    """What dropout on a CPU draws from, in this thread; None: torch's generator, which threads share."""

    generator: torch.Generator | None = None


dropout_random = _DropoutRandom()


def dropout(x: Tensor, p: float) -> Tensor:
    """Each number is 0 with probability p, else divided by 1 - p (section 5.4).

    torch draws one random number for each on a CPU, which is a large part of a small model's step. Here are four
    draws of 16 bits from each 64-bit one; p is rounded to a multiple of 2^-16 below 1, and what is kept is divided by
    the share that is kept.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    if not dropped:
        return x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=dropout_random.generator)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Residual(nn.Module):
    """What stands around each sub-layer (sections 3.1 and 5.4): LayerNorm(x + Dropout(Sublayer(x))), or, with
    norm "pre", x + Dropout(Sublayer(LayerNorm(x)))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm, self.is_pre, self.dropout = nn.LayerNorm(config.d_model), config.norm == "pre", config.dropout

    def pre(self, x: Tensor) -> Tensor:
        """The sub-layer's input."""
        return self.norm(x) if self.is_pre else x

    def post(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's stream, with the sub-layer's output added."""
        x = x + (dropout(output, self.dropout) if self.training else output)
        return x if self.is_pre else self.norm(x)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward (section 3.1, Figure 1 left)."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(c.d_model, c.num_heads, c.d_k, c.d_v, c.positions)
        self.feed_forward = FeedForward(c.d_model, c.d_ff)
        self.attention_residual, self.feed_forward_residual = Residual(c), Residual(c)

    def forward(self, x: Tensor, attend_mask: Tensor) -> Tensor:
        q, k, v = self.self_attention.queries_keys_values(self.attention_residual.pre(x))
        x = self.attention_residual.post(x, self.self_attention(q, k, v, attend_mask))
        return self.feed_forward_residual.post(x, self.feed_forward(self.feed_forward_residual.pre(x)))


class DecoderLayer(nn.Module):
    """Masked self-attention, attention to the encoder's output, feed-forward (section 3.1, Figure 1 right)."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.self_attention = Attention(c.d_model, c.num_heads, c.d_k, c.d_v, c.positions)
        self.cross_attention = Attention(c.d_model, c.num_heads, c.d_k, c.d_v)
        self.feed_forward = FeedForward(c.d_model, c.d_ff)
        self.self_attention_residual, self.cross_attention_residual = Residual(c), Residual(c)
        self.feed_forward_residual = Residual(c)

    def forward(self, x: Tensor, memory: Tensor, attend_mask: Tensor) -> Tensor:
        q, k, v = self.self_attention.queries_keys_values(self.self_attention_residual.pre(x))
        x = self.self_attention_residual.post(x, self.self_attention(q, k, v, causal=True))
        q = self.cross_attention.queries(self.cross_attention_residual.pre(x))
        k, v = self.cross_attention.keys_values(memory)
        x = self.cross_attention_residual.post(x, self.cross_attention(q, k, v, attend_mask))
        return self.feed_forward_residual.post(x, self.feed_forward(self.feed_forward_residual.pre(x)))


class Transformer(nn.Module):
    """The encoder-decoder of Figure 1. Sentences end in EOS and are padded behind it with PAD; the decoder's
    input is the target moved right by one, with BOS before it.

    Padding of the target needs no mask: it stands behind every real position, and none looks ahead.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        # norm "pre" leaves the streams unnormalised at the end; "post" has normalised them already.
        self.encoder_norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if config.norm == "pre" else nn.Identity()

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        """[batch, src], [batch, tgt] -> the decoder's output [batch, tgt, d_model]; see `logits`."""
        memory, attend_mask = self.encode(src)
        x = self.embedding(tgt_in)
        for layer in self.decoder:
            x = layer(x, memory, attend_mask)
        return self.decoder_norm(x)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output [batch, src, d_model] and which of it is no padding [batch, 1, 1, src]."""
        attend_mask = (src != PAD)[:, None, None, :]
        x = self.embedding(src)
        for layer in self.encoder:
            x = layer(x, attend_mask)
        return self.encoder_norm(x), attend_mask

    def logits(self, x: Tensor) -> Tensor:
        """The pre-softmax projection, by the embeddings' own matrix (section 3.4): [..., vocab]."""
        return linear(x, self.embedding.weight)

    def start(self, src: Tensor) -> "BeamKVCache":
        """Encode the sentences, ready to decode them position by position."""
        return BeamKVCache(self, src)


class BeamKVCache:
    """The decoder in the middle of its output: keys and values of all positions so far, per layer.

    Rows are grouped by sentence, as many to each, and all rows of a sentence look at the same keys: those of its
    encoding, and a pool to which each step adds one a row. `ancestors` says which of the pool a row goes on from, so
    that its keys and values stay where they are when rows are reordered, and few attention products serve all rows.
    Most hypotheses die out, and those that live have nearly all ancestors in common: when the pool is full, it is
    cleared of keys and values from which no row goes on.
    """

    def __init__(self, model: Transformer, src: Tensor) -> None:
        memory, self.attend_mask = model.encode(src)
        self.model, self.length = model, 0
        self.layers = cast(list[DecoderLayer], list(model.decoder))
        self.memory = [
            [x.contiguous() for x in layer.cross_attention.keys_values(memory)] for layer in self.layers
        ]  # [sentences, heads, src, d_k or d_v]
        self.pool = [[x[:, :, :0] for x in keys_values] for keys_values in self.memory]  # and spare room behind it
        self.ancestors = torch.ones(len(src), 1, 0, dtype=torch.bool, device=src.device)  # [sentences, rows, pool]
        self.positions = torch.zeros(len(src), 0, dtype=torch.int64, device=src.device)  # [sentences, pool]

    def step(self, tokens: Tensor) -> Tensor:
        """Take the next token of each row: [rows] -> the decoder's output [rows, d_model], see `logits`."""
        num_sentences = len(self.ancestors)
        num_rows = len(tokens) // num_sentences
        if self.ancestors.size(2) + num_rows > self.pool[0][0].size(2):
            self._clear_pool(POOL_STEPS * num_rows)
        first = self.ancestors.size(2)
        last = first + num_rows
        itself = torch.eye(num_rows, dtype=torch.bool, device=tokens.device).expand(num_sentences, -1, -1)
        self.ancestors = torch.cat((self.ancestors, itself), dim=2)
        self.positions = F.pad(self.positions, (0, num_rows), value=self.length)
        attend_mask, offset = self.ancestors[:, None], (self.positions - self.length)[:, None, None]
        x = self.model.embedding(tokens[:, None], first=self.length)  # [all rows, 1, d_model]
        for layer, memory, pool in zip(self.layers, self.memory, self.pool, strict=True):
            new = layer.self_attention.queries_keys_values(layer.self_attention_residual.pre(x), first=self.length)
            q, k, v = (part.view(num_sentences, num_rows, part.size(1), -1).transpose(1, 2) for part in new)
            keys, values = (x[:, :, :last] for x in pool)
            keys[:, :, first:], values[:, :, first:] = k, v
            attended = layer.self_attention(q, keys, values, attend_mask, offset=offset)
            x = layer.self_attention_residual.post(x, attended.view_as(x))
            q = layer.cross_attention.queries(layer.cross_attention_residual.pre(x).view(num_sentences, num_rows, -1))
            attended = layer.cross_attention(q, *memory, self.attend_mask)
            x = layer.cross_attention_residual.post(x, attended.view_as(x))
            x = layer.feed_forward_residual.post(x, layer.feed_forward(layer.feed_forward_residual.pre(x)))
        self.length += 1
        return self.model.decoder_norm(x)[:, 0]

    def logits(self, x: Tensor) -> Tensor:
        """Of the tokens after some rows: [rows, d_model], what `step` has given for them -> [rows, vocab]."""
        return self.model.logits(x)

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what was row `rows[i]`, of the same sentence."""
        self.ancestors = self.ancestors.flatten(0, 1)[rows].unflatten(0, (len(self.ancestors), -1))

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences and their rows alone, in this order."""
        self.attend_mask, self.ancestors = self.attend_mask[sentences], self.ancestors[sentences]
        self.positions = self.positions[sentences]
        places = torch.arange(len(sentences), device=sentences.device)
        moved = (sentences != places).nonzero()[:, 0]
        for tensors in (*self.memory, *self.pool):
            for i, x in enumerate(tensors):
                x[moved] = x.index_select(0, sentences[moved])
                tensors[i] = x[: len(sentences)]

    def _clear_pool(self, room: int) -> None:
        """Of the pool, keep what a row goes on from; have `room` for more behind it, or half as much again."""
        needed = self.ancestors.any(1)
        kept = int(needed.sum(1).max())  # as many of every sentence: some keep dead ones too, which `ancestors` hides
        places = needed.byte().argsort(dim=1, descending=True, stable=True)[:, :kept]  # [sentences, kept]
        self.ancestors = self.ancestors.gather(2, places[:, None].expand(-1, self.ancestors.size(1), -1))
        self.positions = self.positions.gather(1, places)
        for pool in self.pool:
            for i, x in enumerate(pool):
                index = places[:, None, :, None].expand(-1, x.size(1), -1, x.size(3))
                pool[i] = F.pad(x.gather(2, index), (0, 0, 0, max(room, kept // 2)))
