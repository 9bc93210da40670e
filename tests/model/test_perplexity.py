"""Cross-entropy compared with torch's, computed from all logits. Several ranks: pipeline/training/test_loop.py."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import BOS, EOS, PAD
from model.perplexity import cross_entropy, perplexity
from model.transformer import Transformer
from tests.factories import config


class Pairs(NamedTuple):
    src: Tensor
    tgt_in: Tensor
    tgt_out: Tensor


def pairs(tgt_lengths: list[int], seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    size = (len(tgt_lengths), max(tgt_lengths))
    src, tgt_out = (torch.randint(EOS + 1, 23, size, generator=generator) for _ in range(2))
    for row, length in zip(tgt_out, tgt_lengths, strict=True):
        row[length - 1], row[length:] = EOS, PAD
    return Pairs(src, torch.cat((torch.full((len(src), 1), BOS), tgt_out[:, :-1]), dim=1), tgt_out)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(11)
    return Transformer(config(dropout=0.5))


def test_cross_entropy_is_torchs_summed_over_batches_without_dropout(model):
    batches = [pairs([5, 2, 11], seed=1), pairs([7], seed=2)]
    total, tokens = cross_entropy(model.train(), batches)
    assert model.training
    model.eval()
    expected = 0.0
    for src, tgt_in, tgt_out in batches:
        logits = model.logits(model(src, tgt_in)).flatten(0, 1)
        expected += F.cross_entropy(logits, tgt_out.flatten(), ignore_index=PAD, reduction="sum").item()
    assert total == pytest.approx(expected, rel=1e-6)
    assert tokens == 5 + 2 + 11 + 7


def test_cross_entropy_leaves_an_evaluated_model_in_evaluation_and_without_gradients(model):
    cross_entropy(model.eval(), [pairs([3], seed=1)])
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_cross_entropy_of_no_batch_is_0_of_0_tokens(model):
    assert cross_entropy(model, []) == (0.0, 0)


def test_cross_entropy_in_bf16_is_near_and_not_equal(model):
    exact, rounded = (cross_entropy(model, [pairs([13, 4], seed=3)], bf16=bf16)[0] for bf16 in (False, True))
    assert exact != rounded == pytest.approx(exact, rel=1e-2)


def test_perplexity_is_exp_of_the_mean_and_finite_for_any_finite_loss():
    assert perplexity(math.log(7) * 11, 11) == pytest.approx(7)
    assert math.isfinite(perplexity(1e9, 3))
