"""Make the weights for the benchmark of decoding, in the format of pipeline/train.py.

Tiny is trained for four epochs without dropout, enough for translations that end. Base has random weights.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from model.transformer import Transformer
from pipeline.common.checksums import copy_with_sums
from pipeline.common.paths import ENCODED, TOKENIZER
from pipeline.common.settings import load_settings
from pipeline.data.dataset import TOKENIZER_FILE, CorpusInfo
from pipeline.training import checkpoint
from pipeline.training.trainer import train_rank
from tools.benchmarks.harness import ROOT, THREADS

STEPS = 420  # of 4,096 target tokens: four epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=["tiny", "base"])
    parser.add_argument("--folder", type=Path, required=True, help="output")
    parser.add_argument("--data", type=Path, required=True, help="data/ with the encoded corpus")
    arguments = parser.parse_args()
    encoded = arguments.data / ENCODED.name
    torch.set_num_threads(THREADS)
    settings = load_settings(ROOT, model=arguments.preset)
    config = settings.model.config(CorpusInfo.open(encoded).vocab_size)
    if arguments.preset == "tiny":
        train = replace(settings.train, max_steps=STEPS, checkpoint_every=STEPS)
        train = replace(train, warmup_steps=STEPS // 2, lr_scale=0.5)  # a peak of 0.003
        run_folder = arguments.folder / "checkpoints"
        train_rank(
            replace(settings, train=train, model=replace(settings.model, dropout=0.0)),
            encoded,
            run_folder,
            rank=0,
            num_ranks=1,
            device=torch.device("cpu"),
            report=lambda metrics, step: None,
            progress=lambda state, loss: None,
            log=print,
        )
        weights, _ = checkpoint.average(run_folder, 1, print)
    else:
        torch.manual_seed(1)
        weights = dict(Transformer(config).state_dict())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_model(arguments.folder, weights, config)
    copy_with_sums(arguments.data / TOKENIZER.name, arguments.folder, [TOKENIZER_FILE], "tokenize")


if __name__ == "__main__":
    main()
