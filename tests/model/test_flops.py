"""The FLOPs formula compared with torch's FlopCounterMode on real passes, and with the paper's estimate.

The counter adds up every matrix product that torch dispatches. It has no formula for torch's fused attention on CPUs
or for oneDNN's products, so these tests run attention as plain products (SDPBackend.MATH), and all products by MKL.
"""

from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import EOS, PAD, Positions, TransformerConfig
from model.cpu import matmul
from model.flops import training_flops
from model.loss import label_smoothed_loss
from model.transformer import Transformer
from tests.factories import BASE, config


@pytest.fixture(autouse=True)
def _by_mkl(monkeypatch):
    monkeypatch.setattr(matmul, "chosen", lambda: "mkl")


def counted(config: TransformerConfig, batch: int, src: int, tgt: int, padded: int = 0) -> int:
    """Return torch's count for one forward and backward pass. The first target ends with `padded` PADs."""
    model = Transformer(config)
    src_tokens = torch.randint(EOS + 1, config.vocab_size, (batch, src))
    tgt_tokens = torch.randint(EOS + 1, config.vocab_size, (batch, tgt))
    tgt_tokens[0, tgt - padded :] = PAD
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        label_smoothed_loss(model(src_tokens, tgt_tokens), model.embedding.weight, tgt_tokens, 0.1).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("positions", get_args(Positions))
def test_training_flops_are_what_torch_counts(positions, norm):
    sizes = config(max_length=61, positions=positions, norm=norm)
    assert training_flops(sizes, 5, 11, 13) == counted(sizes, 5, 11, 13)


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
def test_training_flops_follow_every_size(changes, batch, src, tgt):
    sizes = config(max_length=61, **changes)
    assert training_flops(sizes, batch, src, tgt) == counted(sizes, batch, src, tgt)


def test_training_flops_count_a_projection_for_padded_targets_that_takes_none():
    assert training_flops(config(), 3, 11, 13) - counted(config(), 3, 11, 13, padded=4) == 4 * 6 * 26 * 23


def test_training_flops_of_numpy_sizes_do_not_overflow():
    sizes = np.array([800, 31, 29], dtype=np.int32)
    flops = training_flops(BASE, *sizes)
    assert type(flops) is int
    assert flops == training_flops(BASE, 800, 31, 29) > 2**31


def test_training_flops_of_base_are_a_quarter_to_a_third_of_the_papers_estimate():
    """Table 2's 3.3e18 is training time x peak rate (8 GPUs, 12 h, 9.5e12 FLOP/s); no GPU sustains its peak."""
    sentences = round(25_000 / 30)  # a step has 25,000 source and 25,000 target tokens (section 5.1)
    flops = 100_000 * training_flops(BASE, sentences, 30, 30)
    assert flops == pytest.approx(9.5e17, rel=0.01)
    estimate = 8 * 12 * 3600 * 9.5e12
    assert estimate == pytest.approx(3.3e18, rel=0.01)
    assert 1 / 4 < flops / estimate < 1 / 3
