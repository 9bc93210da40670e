"""The KV cache of a beam search: implements decoding.Decoder for the Transformer.

All rows (hypotheses) of a sentence share one cache. Each step writes one slot per row. A mask marks the slots that
a row attends to, its ancestors' and its own, so reordering rows moves no keys or values. One sentence with a beam of
two, after three steps:

    slot (step, row)        0,0   1,0   1,1   2,0   2,1
    kv_cache[layer]       [ k v   k v   k v   k v   k v   spare ... ]   k [sentences, heads, slots, d_k], v with d_v
    positions                0     1     1     2     2                  [sentences, slots]
    ancestor_mask  row 0     x     x     .     x     .                  [sentences, rows, slots]
                   row 1     x     x     .     .     x

Both rows of step 2 continue row 0 of step 1, so slot (1, 1) is dead. `reorder` only selects rows of the mask. Dead
slots stay in the cache, because dropping them was no faster (docs/log.md).
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from model.decoding import Decoder
from model.transformer import DecoderLayer, Transformer

STEPS_OF_SPACE = 6
"""A full cache grows by half, but at least by the slots of this many steps."""


class BeamKVCache(Decoder):
    """Each layer's keys and values: those of the positions decoded so far, and those of the encoder's output."""

    def __init__(self, model: Transformer, src: Tensor) -> None:
        memory, self.attend_mask = model.encode(src)
        self.model, self.length = model, 0
        self.layers = cast(list[DecoderLayer], list(model.decoder))
        self.memory = [
            [x.contiguous() for x in layer.cross_attention.project_kv(memory)] for layer in self.layers
        ]  # [sentences, heads, src, d_k or d_v]
        self.kv_cache = [[x[:, :, :0] for x in kv] for kv in self.memory]
        self.ancestor_mask = torch.ones(len(src), 1, 0, dtype=torch.bool, device=src.device)
        self.positions = torch.zeros(len(src), 0, dtype=torch.int64, device=src.device)

    def step(self, tokens: Tensor) -> Tensor:
        """Feed each row its next token: [rows] -> the decoder's output [rows, d_model], the input of `logits`."""
        num_sentences = len(self.ancestor_mask)
        num_rows = len(tokens) // num_sentences  # per sentence
        first = self.ancestor_mask.size(2)  # new slots: first to last - 1
        last = first + num_rows
        if last > self.kv_cache[0][0].size(2):
            self._grow(max(STEPS_OF_SPACE * num_rows, first // 2))
        itself = torch.eye(num_rows, dtype=torch.bool, device=tokens.device).expand(num_sentences, -1, -1)
        self.ancestor_mask = torch.cat((self.ancestor_mask, itself), dim=2)
        self.positions = F.pad(self.positions, (0, num_rows), value=self.length)
        attend_mask, offset = self.ancestor_mask[:, None], (self.positions - self.length)[:, None, None]
        x = self.model.embedding(tokens[:, None], first=self.length)  # [all rows, 1, d_model]
        for layer, memory, kv_cache in zip(self.layers, self.memory, self.kv_cache, strict=True):
            new = layer.self_attention.project_qkv(layer.self_attention_residual.pre(x), first=self.length)
            q, k, v = (  # [sentences, heads, rows, d_k or d_v]
                part.view(num_sentences, num_rows, part.size(1), -1).transpose(1, 2) for part in new
            )
            keys, values = (x[:, :, :last] for x in kv_cache)
            keys[:, :, first:], values[:, :, first:] = k, v
            attended = layer.self_attention(q, keys, values, attend_mask, offset=offset)  # [sentences, rows, d_model]
            x = layer.self_attention_residual.post(x, attended.view_as(x))
            q = layer.cross_attention.project_q(
                layer.cross_attention_residual.pre(x).view(num_sentences, num_rows, -1)
            )
            attended = layer.cross_attention(q, *memory, self.attend_mask)
            x = layer.cross_attention_residual.post(x, attended.view_as(x))
            x = layer.feed_forward_residual.post(x, layer.feed_forward(layer.feed_forward_residual.pre(x)))
        self.length += 1
        return self.model.decoder_norm(x)[:, 0]

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the next token for some rows of `step`'s output: [some rows, d_model] -> [some rows, vocab]."""
        return self.model.logits(x)

    def reorder(self, rows: Tensor) -> None:
        """Let new row i continue old row `rows[i]`, of the same sentence."""
        num_sentences = len(self.ancestor_mask)
        self.ancestor_mask = self.ancestor_mask.flatten(0, 1)[rows].unflatten(0, (num_sentences, -1))

    def select_sentences(self, sentences: Tensor) -> None:
        """Keep only these sentences with their rows, in this order."""
        self.attend_mask, self.ancestor_mask = self.attend_mask[sentences], self.ancestor_mask[sentences]
        self.positions = self.positions[sentences]
        moved = (sentences != torch.arange(len(sentences), device=sentences.device)).nonzero()[:, 0]
        for tensors in (*self.memory, *self.kv_cache):
            for i, x in enumerate(tensors):
                x[moved] = x.index_select(0, sentences[moved])  # in place: most stay where they are
                tensors[i] = x[: len(sentences)]

    def _grow(self, slots: int) -> None:
        for kv in self.kv_cache:
            for i, x in enumerate(kv):
                kv[i] = F.pad(x, (0, 0, 0, slots))
