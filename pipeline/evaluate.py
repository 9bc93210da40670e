"""Translate the test split by beam search (section 6.1 of the paper) and score it; compute perplexities.

    python -m pipeline.evaluate

Reads models/final, data/tokenizer, data/encoded and data/clean; writes reports/evaluation.json,
reports/bleu_by_length.csv and reports/translations.tsv, and adds them and the model to the training's run in MLflow.
"""

import os
from typing import TYPE_CHECKING, Any

import torch

from pipeline.common import cli
from pipeline.common.settings import load_settings
from pipeline.inference.evaluation import run

if TYPE_CHECKING:
    pass


LABELS = {
    "bleu": "sacreBLEU (detokenised; compare with others' sacreBLEU)",
    "bleu_paper": "the paper's BLEU (Moses tokens, German compounds split)",
    "bleu_lowercase": "Multi30k papers' BLEU (Moses tokens, lower-cased)",
    "chrf": "chrF2",
}


def table(metrics: dict[str, Any]) -> str:
    """The metrics for people; each score with its signature below it."""
    test, valid = metrics["test"], metrics["valid"]
    lines = [f"{test['sentences']} test sentences, {metrics['sentences_per_second']:.1f} translated a second"]
    for name, label in LABELS.items():
        lines += [f"  {label:58}{test[name]:7.2f}", f"      {test[f'{name}_signature']}"]
    lines += [
        f"  {'length of the output / length of the reference':58}{test['length_ratio']:7.3f}",
        f"  {'outputs cut off before they ended':58}{test['cut_off']:7}",
        f"  {'perplexity per piece: test, validation':58}{test['ppl']:7.3f} {valid['averaged_ppl']:7.3f}",
        f"  {'perplexity per word: test, validation':58}{test['ppl_word']:7.3f} {valid['averaged_ppl_word']:7.3f}",
    ]
    return "\n".join(lines)


def main() -> None:
    cli.parser("pipeline.evaluate", __doc__).parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with cli.exit_on_error("evaluate"):
        print(table(run(load_settings()).metrics))


if __name__ == "__main__":
    main()
