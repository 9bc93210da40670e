"""Objects that many tests need: sizes, models, sentences of random tokens, settings, an encoded corpus."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.config import BOS, EOS, PAD, TransformerConfig
from model.transformer import Transformer
from pipeline.common.atomic_io import read_sums
from pipeline.common.checksums import write_sums
from pipeline.common.settings import Model, Settings, Train, load_settings
from pipeline.data.dataset import SIDES, SPLITS, encoded_paths
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState, adam

REPOSITORY = Path(__file__).parents[1]

SMALL = TransformerConfig(
    vocab_size=23, num_layers=2, d_model=26, d_ff=17, num_heads=3, d_k=10, d_v=7,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=41,
)  # fmt: skip
"""All sizes differ, so that a test fails if two of them are confused."""
BASE = TransformerConfig(
    vocab_size=37_000, num_layers=6, d_model=512, d_ff=2048, num_heads=8, d_k=64, d_v=64,
    dropout=0.1, positions="sinusoidal", norm="post", max_length=1024,
)  # fmt: skip
"""The paper's base model (Table 3)."""
TRAIN = Train(
    seed=1, label_smoothing=0.1, batch_tokens=170, max_steps=9, warmup_steps=3, lr_scale=0.5, beta1=0.9, beta2=0.98,
    eps=1e-9, max_grad_norm=0.0, log_every=1, validate_every=4, bleu_sentences=0, patience=0,
    checkpoint_every=3, keep_checkpoints=5, average_checkpoints=2,
)  # fmt: skip
PAIRS = {"train": 97, "valid": 13, "test": 3}
"""Sentence pairs in each split of `write_corpus`."""
VALID_WORDS = 41
"""Number of words that the meta.json of `write_corpus` states for each text."""


def config(**changes: Any) -> TransformerConfig:
    """Return SMALL with these fields changed."""
    return replace(SMALL, **changes)


def build(config: TransformerConfig = SMALL, seed: int = 1) -> Transformer:
    """Return a model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return Transformer(config).eval()


def save_checkpoint(run_folder: Path, state: TrainState) -> None:
    """Write a checkpoint with the weights after one step and with this state."""
    model = Transformer(config())
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint.save(run_folder, model, optimizer, state, {}, keep=100)


def sentences(lengths: list[int], vocab_size: int = 23, seed: int = 2) -> Tensor:
    """Return random tokens [len(lengths), longest]. Each row ends with EOS and is padded with PAD."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(EOS + 1, vocab_size, (length - 1,), generator=generator) for length in lengths]
    rows = [torch.cat((row, torch.tensor([EOS]))) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def shifted(tgt: Tensor) -> Tensor:
    """Return the decoder's input for these targets."""
    return torch.cat((torch.full((len(tgt), 1), BOS), tgt[:, :-1].masked_fill(tgt[:, :-1] == EOS, PAD)), dim=1)


def train_settings(**changes: Any) -> Train:
    """Return settings of training for nine steps, with these fields changed."""
    return replace(TRAIN, **changes)


def settings(
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    hardware: dict[str, Any] | None = None,
) -> Settings:
    """Return the project's settings with a small model, dropout, `train_settings`, and these fields changed.

    With the corpus of `write_corpus`, an epoch is four steps of a few micro-batches.
    """
    own = load_settings(REPOSITORY)
    sizes = asdict(config(num_layers=1, d_model=14, d_k=5, dropout=0.2, max_length=31))
    del sizes["vocab_size"]
    machine = {"precision": "fp32", "compile": False, "micro_batch_tokens": 53}
    return replace(
        own,
        model=Model(**sizes | (model or {})),
        train=train_settings(**train or {}),
        hardware=replace(own.hardware, **machine | (hardware or {})),
    )


def write_corpus(folder: Path, longest: int = 11, vocab_size: int = 23, longest_tgt: int | None = None) -> None:
    """Write an encoded corpus of random tokens as the tokenize stage does, with PAIRS pairs per split.

    A sentence has at most `longest` tokens, a target sentence at most `longest_tgt`, if given.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for split in SPLITS:
        for side, most in zip(SIDES, (longest, longest_tgt or longest), strict=True):
            lengths = rng.integers(1, most + 1, PAIRS[split])
            ids_path, offsets_path = encoded_paths(folder, split, side)
            np.save(ids_path, rng.integers(EOS + 1, vocab_size, lengths.sum()).astype(np.uint16))
            np.save(offsets_path, np.concatenate(([0], lengths.cumsum())))
    words = {split: {side: VALID_WORDS for side in SIDES} for split in SPLITS}
    info = {
        "src": "en",
        "tgt": "de",
        "vocab_size": vocab_size,
        "pairs": PAIRS,
        "words": words,
        "texts": {},
        "sha256": "0" * 64,
    }
    (folder / "meta.json").write_text(json.dumps(info))
    write_sums(folder, [path.name for path in folder.iterdir()])


def update_sums(folder: Path) -> None:
    """Make SHA256SUMS match the current files, as if they had been written like this."""
    write_sums(folder, read_sums(folder))


def edit_corpus(folder: Path, **values: Any) -> None:
    """Set these values in meta.json, as if the corpus had been written with them."""
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    update_sums(folder)
