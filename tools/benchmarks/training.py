"""Training: target tokens per second, without padding, of ours and of other toolkits, on the same tokens.

Sizes, dropout, label smoothing and Adam are the same, and a step has about as many target tokens. transformers'
MarianMTModel and torch's own modules run in the plain loop that their documentation shows. Their batches have pairs
of similar length, with a limit on the padded tokens of source and of target. torch.nn.Transformer also drops
attention weights.

This module also runs in the environment of the other toolkits: at module level, import only numpy, torch and
harness.py.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.benchmarks.harness import ROOT, serve

PAD, BOS, EOS = 0, 2, 3
SMOOTHING, RATE = 0.1, 1e-4
BETAS, EPS = (0.9, 0.98), 1e-9
Block = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Work:
    """The work of one block. `sizes` are the fields of TransformerConfig."""

    corpus: Path
    sizes: dict[str, Any]
    steps: int
    batch_tokens: int
    device: torch.device
    bf16: bool


def ours(work: Work, micro_batch_tokens: int, compiled: bool) -> Block:
    """The step of pipeline/training/loop.py, with the batches of pipeline/training/trainer.py."""
    from model.config import TransformerConfig
    from model.transformer import Transformer
    from pipeline.common.settings import load_settings
    from pipeline.data.batching import BatchPlan, Position, collate
    from pipeline.data.dataset import EncodedSplit
    from pipeline.training.loop import GlobalBatch, TrainState, adam, train_step
    from pipeline.training.threads import ThreadedDataParallel

    split = EncodedSplit.open(work.corpus, "train")
    budgets = {"batch_tokens": work.batch_tokens, "micro_batch_tokens": micro_batch_tokens, "max_length": 512}
    plan = BatchPlan(split.src.lengths, split.tgt.lengths, seed=1, **budgets)
    model = Transformer(TransformerConfig(**work.sizes)).to(work.device)
    optimizer, state = adam(model, *BETAS, EPS), TrainState()
    settings = replace(load_settings(ROOT).train, label_smoothing=SMOOTHING, max_grad_norm=0.0)
    parallel = ThreadedDataParallel(model, compile=compiled)
    planned = plan.from_position(Position(0, 0))

    def step() -> tuple[int, int]:
        _, micro_batches = next(planned)
        num_tokens = plan.num_tgt_tokens(micro_batches)
        batches = ((i, collate(split, indices)) for i, indices in enumerate(micro_batches))
        batch = GlobalBatch(Position(0, 0), batches, num_tokens)
        train_step(parallel, optimizer, batch, settings, state, seed=1, bf16=work.bf16, rate=RATE)
        state.step += 1
        padded = (len(indices) * (int(split.tgt.lengths[indices].max()) + 1) for indices in micro_batches)
        return num_tokens, sum(padded)

    return lambda: _timed(step, work.steps)


def plain_loop(model: nn.Module, work: Work) -> Block:
    """Train `model`, which maps tokens [batch, src] and [batch, tgt] to logits [batch, tgt, vocab]."""
    model.to(work.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS, eps=EPS)
    batches = _batches(work.corpus, work.batch_tokens)

    def step() -> tuple[int, int]:
        src, tgt = (x.to(work.device) for x in next(batches))
        optimizer.zero_grad()
        with torch.autocast(work.device.type, torch.bfloat16, enabled=work.bf16):
            logits = model(src, torch.cat((torch.full_like(tgt[:, :1], BOS), tgt[:, :-1]), 1))
            loss = F.cross_entropy(
                logits.view(-1, work.sizes["vocab_size"]),
                tgt.flatten(),
                ignore_index=PAD,
                label_smoothing=SMOOTHING,
            )
        loss.backward()
        optimizer.step()
        loss.item()
        return int((tgt != PAD).sum()), tgt.numel()

    return lambda: _timed(step, work.steps)


def _timed(step: Callable[[], tuple[int, int]], steps: int) -> dict[str, float]:
    """Time `steps` calls of `step`, which returns its number of target tokens without and with padding."""
    started = time.perf_counter()
    tokens, positions = map(sum, zip(*(step() for _ in range(steps)), strict=True))
    return {"tokens_per_s": tokens / (time.perf_counter() - started), "padding": 1 - tokens / positions}


def _batches(corpus: Path, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The other toolkits' batches: pairs sorted by length, cut at `batch_tokens` padded tokens, in random order."""
    sides = []
    for side in ("src", "tgt"):
        tokens, offsets = (np.load(corpus / f"train.{side}.{what}.npy") for what in ("ids", "offsets"))
        sentences = np.split(tokens.astype(np.int64), offsets[1:-1])
        sides.append([torch.from_numpy(np.append(sentence, EOS)) for sentence in sentences])
    longest = [max(len(src), len(tgt)) for src, tgt in zip(*sides, strict=True)]
    batches: list[list[int]] = [[]]
    width = 0
    for i in sorted(range(len(longest)), key=lambda i: (len(sides[1][i]), len(sides[0][i]))):
        width = max(width, longest[i])
        if width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = longest[i]
        batches[-1].append(i)
    while True:
        for batch in random.Random(1).sample(batches, len(batches)):
            src, tgt = (nn.utils.rnn.pad_sequence([side[i] for i in batch], True, PAD) for side in sides)
            yield src, tgt


class Marian(nn.Module):
    """transformers' MarianMTModel: the paper's model, without dropout on attention weights."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.model = marian(sizes)

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        return self.model(input_ids=src, attention_mask=(src != PAD).long(), decoder_input_ids=tgt_in).logits


def marian(sizes: dict[str, Any]) -> Any:
    """A MarianMTModel of these sizes, with random weights."""
    from transformers import MarianConfig, MarianMTModel

    layers, heads, d_ff = sizes["num_layers"], sizes["num_heads"], sizes["d_ff"]
    config = MarianConfig(
        vocab_size=sizes["vocab_size"],
        decoder_vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=d_ff,
        decoder_ffn_dim=d_ff,
        dropout=sizes["dropout"],
        attention_dropout=0.0,
        activation_dropout=0.0,
        activation_function="relu",
        scale_embedding=True,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
    )
    return MarianMTModel(config)


class TorchTransformer(nn.Module):
    """torch.nn.Transformer, with an embedding, sinusoids, and a projection that shares the embedding's weights."""

    positions: Tensor

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        d_model, layers = sizes["d_model"], sizes["num_layers"]
        self.scale = d_model**0.5
        self.embedding = nn.Embedding(sizes["vocab_size"], d_model, padding_idx=PAD)
        self.dropout = nn.Dropout(sizes["dropout"])
        self.transformer = nn.Transformer(
            d_model, sizes["num_heads"], layers, layers, sizes["d_ff"], sizes["dropout"], batch_first=True
        )
        angles = torch.arange(512)[:, None] / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
        self.register_buffer("positions", torch.stack((angles.sin(), angles.cos()), -1).flatten(1))

    def forward(self, src: Tensor, tgt_in: Tensor) -> Tensor:
        future = nn.Transformer.generate_square_subsequent_mask(tgt_in.size(1), tgt_in.device, torch.bool)
        x = self.transformer(
            self._embed(src),
            self._embed(tgt_in),
            tgt_mask=future,
            src_key_padding_mask=src == PAD,
            memory_key_padding_mask=src == PAD,
            tgt_is_causal=True,
        )
        return F.linear(x, self.embedding.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) * self.scale + self.positions[: tokens.size(1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["ours", "marian", "torch"])
    parser.add_argument("--corpus", type=Path, required=True, help="data/encoded")
    parser.add_argument("--sizes", type=json.loads, required=True, help="fields of TransformerConfig, as JSON")
    parser.add_argument("--steps", type=int, required=True, help="steps in a block")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="target tokens per step (%(default)s)")
    parser.add_argument("--micro-batch-tokens", type=int, default=1280, help="micro-batches of ours (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--bf16", action="store_true", help="train with bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="use torch.compile in ours")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    sizes = arguments.sizes
    work = Work(arguments.corpus, sizes, arguments.steps, arguments.batch_tokens, arguments.device, arguments.bf16)
    if arguments.system == "ours":
        block = ours(work, arguments.micro_batch_tokens, arguments.compile)
    else:
        block = plain_loop(Marian(sizes) if arguments.system == "marian" else TorchTransformer(sizes), work)
    serve(block)


if __name__ == "__main__":
    main()
