"""Scaled dot-product attention for a CPU: batched products of all heads instead of torch's fused kernel.

The fused kernel never writes the weights [queries, keys] to memory, which pays for long sentences. For sentences of a
few dozen tokens batched products are faster, because the kernel gains nothing from a second thread.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_UNFUSED_QUERIES = 256
"""Up to this number of queries, a CPU writes the weights [queries, keys] to memory."""


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d_k) + mask) V (equation 1) in each head: [batch, heads, queries, d_v].

    q is [batch, heads, queries, d_k], k [batch, heads, keys, d_k], v [batch, heads, keys, d_v]. `mask` is None, a
    boolean tensor that is True where to attend, or a bias to add. It broadcasts to [batch, heads, queries, keys].
    With `causal`, query i attends to keys 0 to i, and `mask` must be None.
    """
    if q.device.type != "cpu" or q.size(2) > MAX_UNFUSED_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    batch, num_heads, num_queries, d_k = q.shape
    bias = q.new_zeros(1, 1, 1)
    if causal:
        mask = torch.ones(num_queries, k.size(2), dtype=torch.bool).tril()
    if mask is not None:
        bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    if bias.dim() == 4:  # differs by sentence
        bias = bias.expand(batch, num_heads, -1, -1).flatten(0, 1)  # [batch * heads, 1 or queries, keys]
    elif len(bias) > 1:  # differs by head
        bias = bias.repeat(batch, 1, 1)  # [batch * heads, queries, keys]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [batch * heads, queries or keys, d_k or d_v]
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d_k**-0.5).softmax(-1)  # [batch * heads, queries, keys]
    return torch.bmm(weights, v).unflatten(0, (batch, num_heads))
