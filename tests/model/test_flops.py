"""The formula against torch's FlopCounterMode over real passes, and the paper's own estimate.

The counter adds up every matrix product that torch dispatches. It has no formula for torch's fused attention on CPUs,
nor for oneDNN's products, so the passes here run attention as plain products (SDPBackend.MATH), and all by MKL.
"""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import EOS, PAD, Positions, TransformerConfig
from model.cpu import matmul as products
from model.flops import training_flops
from model.loss import label_smoothed_loss
from model.transformer import Transformer

SMALL = TransformerConfig(
    vocab_size=23, num_layers=2, d_model=26, d_ff=17, num_heads=3, d_k=10, d_v=7,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=61,
)  # fmt: skip
BASE = TransformerConfig(
    vocab_size=37_000, num_layers=6, d_model=512, d_ff=2048, num_heads=8, d_k=64, d_v=64,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=1024,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _by_mkl(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", False)


def counted(config: TransformerConfig, batch: int, src: int, tgt: int, padded: int = 0) -> int:
    """By torch, over one forward and backward pass; the first target ends in `padded` times PAD."""
    model = Transformer(config)
    src_pieces = torch.randint(EOS + 1, config.vocab_size, (batch, src))
    tgt_pieces = torch.randint(EOS + 1, config.vocab_size, (batch, tgt))
    tgt_pieces[0, tgt - padded :] = PAD
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        label_smoothed_loss(model(src_pieces, tgt_pieces), model.embedding.weight, tgt_pieces, 0.1).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", get_args(Positions))
def test_the_formula_gives_what_torch_counts(positions, norm):
    config = replace(SMALL, positions=positions, norm=norm)
    assert training_flops(config, 5, 11, 13) == counted(config, 5, 11, 13)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_k": 8, "d_v": 8},
        {"d_k": 2, "d_v": 19},
        {"num_heads": 1},
        {"num_heads": 7, "positions": "relative"},
        {"num_layers": 5},
        {"d_model": 38},
        {"d_ff": 131},
        {"vocab_size": 1009},
    ],
)
@pytest.mark.parametrize(("batch", "src", "tgt"), [(1, 3, 2), (3, 53, 7), (2, 5, 47)])
def test_the_formula_follows_every_size(changes, batch, src, tgt):
    config = replace(SMALL, **changes)
    assert training_flops(config, batch, src, tgt) == counted(config, batch, src, tgt)


def test_a_padded_target_position_costs_no_projection():
    assert training_flops(SMALL, 3, 11, 13) - counted(SMALL, 3, 11, 13, padded=4) == 4 * 6 * 26 * 23


def test_sizes_may_be_numpys_and_do_not_overflow():
    sizes = np.array([800, 31, 29], dtype=np.int32)
    flops = training_flops(BASE, *sizes)
    assert type(flops) is int
    assert flops == training_flops(BASE, 800, 31, 29) > 2**31


def test_base_takes_more_than_a_quarter_and_less_than_a_third_of_the_papers_estimate():
    """Table 2's 3.3e18 is the time of 8 GPUs at their full rate (12 h, 9.5e12 a second); no GPU sustains that."""
    sentences = round(25_000 / 30)  # 25,000 tokens of each side a step (section 5.1), in sentences of 30 pieces
    flops = 100_000 * training_flops(BASE, sentences, 30, 30)
    assert flops == pytest.approx(9.5e17, rel=0.01)
    estimate = 8 * 12 * 3600 * 9.5e12
    assert estimate == pytest.approx(3.3e18, rel=0.01)
    assert 1 / 4 < flops / estimate < 1 / 3
