"""Attention by batched matrix products, compared with torch's fused kernel."""

import pytest
import torch
from torch.nn import functional as F

from model.cpu.attention import MAX_UNFUSED_QUERIES, scaled_dot_product_attention


@pytest.mark.parametrize("d_v", [3, 8])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "queries x keys", "bias of heads", "bias of all"])
def test_scaled_dot_product_attention_equals_the_fused_kernel(mask, d_v):
    torch.manual_seed(5)
    batch, heads, queries, keys, d_k = 3, 2, 5, 5 if mask == "causal" else 7, 8
    q, k, v = (
        torch.randn(batch, heads, n, d).requires_grad_() for n, d in ((queries, d_k), (keys, d_k), (keys, d_v))
    )
    masks = {
        "padding": torch.arange(keys) < torch.tensor([keys, 1, 4])[:, None, None, None],
        "queries x keys": torch.rand(queries, keys) < 0.5,
        "bias of heads": torch.randn(heads, queries, keys),
        "bias of all": torch.randn(batch, heads, queries, keys),
    }
    masks["queries x keys"][:, 0] = True  # each query attends to at least one key
    given, causal = masks.get(mask), mask == "causal"
    ours = scaled_dot_product_attention(q, k, v, given, causal)
    fused = F.scaled_dot_product_attention(q, k, v, given, is_causal=causal)
    torch.testing.assert_close(ours, fused)
    up = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), up) for x in (ours, fused)), strict=True):
        torch.testing.assert_close(one, other)


def test_scaled_dot_product_attention_of_many_queries_is_the_fused_kernels_to_the_bit():
    torch.manual_seed(5)
    q, k, v = (torch.randn(2, 3, MAX_UNFUSED_QUERIES + 1, 5) for _ in range(3))
    found = scaled_dot_product_attention(q, k, v, None, True)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_scaled_dot_product_attention_of_few_queries_computes_no_fused_kernel():
    q = torch.randn(1, 1, MAX_UNFUSED_QUERIES, 4)
    with torch.profiler.profile() as profile:
        scaled_dot_product_attention(q, q, q, None, False)
    names = {event.key for event in profile.key_averages()}
    assert "aten::baddbmm" in names
    assert "aten::scaled_dot_product_attention" not in names
