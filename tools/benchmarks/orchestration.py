"""The bare training loop: pipeline/training/trainer.py on a project's settings, without Ray, MLflow and checkpoints.

Reports its steps in a file, as a run under Ray does.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.cluster.progress import ProgressReporter
from pipeline.common.paths import ENCODED
from pipeline.common.settings import load_settings
from pipeline.training.loop import TrainState
from pipeline.training.trainer import train_rank
from tools.benchmarks.harness import THREADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, required=True, help="folder with params.yaml and data/encoded")
    parser.add_argument("--progress", type=Path, required=True, help="file for the report of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    settings = load_settings(arguments.project)
    train = replace(settings.train, checkpoint_every=2 * settings.train.max_steps)
    reporter = ProgressReporter(arguments.progress)

    def progress(state: TrainState, loss: float) -> None:
        reporter.progress(state.step, "")

    with TemporaryDirectory() as folder:
        train_rank(
            replace(settings, train=train),
            arguments.project / ENCODED,
            Path(folder),
            rank=0,
            num_ranks=1,
            device=torch.device("cpu"),
            report=lambda metrics, step: None,
            progress=progress,
            log=lambda line: None,
        )


if __name__ == "__main__":
    main()
