"""Translate the test split by beam search (section 6.1 of the paper) and score it; compute perplexities.

    python -m pipeline.evaluate

Reads models/final, data/tokenizer, data/encoded and data/clean; writes reports/evaluation.json,
reports/bleu_by_length.csv and reports/translations.tsv, and adds them and the model to the training's run in MLflow.
"""

import os

import torch

from pipeline.common import cli
from pipeline.common.settings import load_settings
from pipeline.inference.evaluation import evaluate_run
from pipeline.inference.reports import format_scores


def main() -> None:
    cli.parser("pipeline.evaluate", __doc__).parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cli.exit_on_error("evaluate"):
        print(format_scores(evaluate_run(load_settings()).metrics))


if __name__ == "__main__":
    main()
