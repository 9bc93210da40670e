"""The bare loop: pipeline/worker.py on the settings of a project, without Ray, MLflow and checkpoints."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from harness import THREADS, serve

from pipeline.corpus import ENCODED
from pipeline.loop import State
from pipeline.params import load_settings
from pipeline.worker import train_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="that are timed, after as many that are not")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    settings = load_settings(arguments.project)
    train = replace(settings.train, max_steps=2 * arguments.steps, checkpoint_every=10 * arguments.steps)

    def block() -> dict[str, float]:
        times: list[float] = []

        def progress(state: State, loss: float) -> None:
            times.append(time.perf_counter())

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
                say=lambda line: None,
            )
        return {"seconds": times[-1] - times[arguments.steps - 1]}

    serve(block, warm_up=False)


if __name__ == "__main__":
    main()
