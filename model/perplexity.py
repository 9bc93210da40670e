"""Perplexity (section 6.2, Table 3): exp of the mean cross-entropy, without label smoothing."""

import math
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import PAD
from model.loss import label_smoothed_loss
from model.transformer import Transformer


class Batch(Protocol):
    """Sentence pairs as token tensors, padded with PAD."""

    src: Tensor  # [batch, src]
    tgt_in: Tensor  # [batch, tgt]: BOS and the target
    tgt_out: Tensor  # [batch, tgt]: the target and EOS


@torch.no_grad()
def cross_entropy(model: Transformer, batches: Iterable[Batch], bf16: bool = False) -> tuple[float, int]:
    """Sum of -ln p(token), in nats, over the target tokens, and the number of target tokens.

    EOS counts, PAD does not. Each rank passes its own batches; if torch.distributed is initialised, both results are
    summed over the ranks. The model is in evaluation mode meanwhile.
    """
    training = model.training
    model.eval()
    device = model.embedding.weight.device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    for batch in batches:
        tgt_out = batch.tgt_out.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = model(batch.src.to(device), batch.tgt_in.to(device))
            total[0] += label_smoothed_loss(x, model.embedding.weight, tgt_out, smoothing=0.0)
        total[1] += (tgt_out != PAD).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    model.train(training)
    return total[0].item(), int(total[1].item())


def perplexity(nats: float, count: int) -> float:
    """exp(nats / count), at most exp(700): an untrained model's perplexity per word would overflow a float."""
    return math.exp(min(nats / count, 700.0))
