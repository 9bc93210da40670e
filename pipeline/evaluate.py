"""Translate and score the test and validation splits; compute perplexities.

    python -m pipeline.evaluate

Translates by beam search as in section 6.1 of the paper, with the settings in
the "evaluate" section of params.yaml. Prints the scores.

Reads models/final, data/tokenizer, data/encoded and data/clean. Writes
metrics/test.json and, in reports/, evaluation.json, bleu_by_length (.csv and
.png), translations.tsv and translations_valid.tsv. Adds the reports, the scores
and the model to the MLflow run in which the model was trained.
"""

import os

import torch

from pipeline.common import cli
from pipeline.common.atomic_io import write_json
from pipeline.common.chart import write_chart
from pipeline.common.paths import METRICS, REPORTS
from pipeline.common.settings import load_settings
from pipeline.inference.evaluation import evaluate_run
from pipeline.inference.reports import format_scores, shown_metrics


def main() -> None:
    cli.parser("pipeline.evaluate", __doc__).parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cli.exit_on_error("evaluate"):
        evaluation = evaluate_run(load_settings())
        write_json(METRICS / "test.json", shown_metrics(evaluation.metrics))
        chart = REPORTS / "bleu_by_length.png"
        write_chart(chart, evaluation.by_length, ("source_words", "words of the source"), {"bleu": "Test BLEU"}, True)
        print(format_scores(evaluation.metrics))


if __name__ == "__main__":
    main()
