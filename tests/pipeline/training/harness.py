"""Random sentences and the training loop on them, without corpus and Ray. A step takes milliseconds."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.config import BOS, EOS, PAD, TransformerConfig
from model.transformer import Transformer
from pipeline.common.settings import Train
from pipeline.data.batching import Position
from pipeline.training.loop import GlobalBatch, TrainState, adam, train_loop
from pipeline.training.threads import ThreadedDataParallel
from tests.factories import config, train_settings

VOCAB = 23
CONFIG = config(vocab_size=VOCAB, num_layers=1, d_model=14, d_k=5, dropout=0.0)
DROPPING = replace(CONFIG, dropout=0.3)
SETTINGS = train_settings(max_steps=3, validate_every=1000, checkpoint_every=1000)
SEED = 5


class Sentences(NamedTuple):
    src: Tensor
    tgt_in: Tensor
    tgt_out: Tensor

    @property
    def num_tokens(self) -> int:
        return int((self.tgt_out != PAD).sum())


def pad(rows: list[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def batch(pairs: list[tuple[list[int], list[int]]]) -> Sentences:
    src, tgt = zip(*pairs, strict=True)
    return Sentences(pad([[*s, EOS] for s in src]), pad([[BOS, *t] for t in tgt]), pad([[*t, EOS] for t in tgt]))


def random_pairs(count: int, seed: int, longest: int = 7) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.integers(EOS + 1, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(2))
        for _ in range(count)
    ]  # type: ignore[misc]


def micro_batches(sizes: list[int], seed: int = 1) -> list[Sentences]:
    """Return micro-batches of these sizes. The sentences depend only on the sum of the sizes and the seed."""
    pairs = iter(random_pairs(sum(sizes), seed))
    return [batch([next(pairs) for _ in range(size)]) for size in sizes]


def endless(
    epoch: list[list[Sentences]], state: TrainState, rank: int = 0, num_ranks: int = 1
) -> Iterator[GlobalBatch]:
    """Yield this rank's share of the steps of an epoch, repeated forever, from the position of `state`."""
    number, at = state.position
    while True:
        whole = epoch[at]
        number, at = (number + 1, 0) if at + 1 == len(epoch) else (number, at + 1)
        mine = list(enumerate(whole))[rank::num_ranks]
        yield GlobalBatch(Position(number, at), mine, sum(micro.num_tokens for micro in whole))


def new_model(config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(11)
    return Transformer(config)


def nothing(*_: Any) -> None:
    pass


def run(
    model: Transformer,
    epoch: list[list[Sentences]],
    settings: Train = SETTINGS,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: TrainState | None = None,
    compile: bool = False,
    bf16: bool = False,
    learning_rate: Callable[[int], float] = lambda step: 0.01 / step,
    validate: Callable[[], dict[str, float]] = lambda: {"valid_loss": 1.0},
    save: Callable[[TrainState], None] = nothing,
    report: Callable[[dict[str, float], int], None] = nothing,
    rank: int = 0,
    num_ranks: int = 1,
) -> TrainState:
    state = TrainState() if state is None else state
    with ThreadedDataParallel(model, compile=compile) as parallel:
        return train_loop(
            parallel, optimizer or adam(model, 0.9, 0.98, 1e-9), endless(epoch, state, rank, num_ranks), settings,
            state, seed=SEED, bf16=bf16, learning_rate=learning_rate, validate=validate, save=save, report=report,
            progress=nothing,
        )  # fmt: skip


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
