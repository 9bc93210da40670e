"""What an evaluation leaves: files in reports/, a table for the terminal, scores and samples in MLflow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_csv, write_json, write_text
from pipeline.common.paths import TOKENIZER
from pipeline.common.settings import Settings
from pipeline.common.storage import tracking_uri
from pipeline.inference.translate import Translation
from pipeline.tracking.results import find_training_run, log_evaluation, log_model

SCORE_LABELS = {
    "bleu": "sacreBLEU (detokenised; compare with others' sacreBLEU)",
    "bleu_paper": "the paper's BLEU (Moses tokens, German compounds split)",
    "bleu_lowercase": "Multi30k papers' BLEU (Moses tokens, lower-cased)",
    "chrf": "chrF2",
}


@dataclass(frozen=True)
class Evaluation:
    """`metrics` and `by_length` are the content of the reports; the lists have an entry for every test sentence."""

    metrics: dict[str, Any]
    by_length: list[dict[str, float]]
    sources: list[str]
    references: list[str]
    translations: list[Translation]


def write_reports(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json, bleu_by_length.csv and translations.tsv; return their paths."""
    paths = [folder / name for name in ("evaluation.json", "bleu_by_length.csv", "translations.tsv")]
    write_json(paths[0], evaluation.metrics)
    write_csv(paths[1], evaluation.by_length)
    lines = ["source\treference\ttranslation\tscore"]
    for source, reference, best in zip(
        evaluation.sources, evaluation.references, evaluation.translations, strict=True
    ):
        columns = (" ".join(text.split()) for text in (source, reference, best.text))  # no tab within one
        lines.append("\t".join((*columns, f"{best.score:.4f}")))
    write_text(paths[2], "\n".join(lines) + "\n")
    return paths


def log_to_mlflow(
    evaluation: Evaluation,
    files: list[Path],
    settings: Settings,
    trained_on: dict[str, Any],
    root: Path,
    final: Path,
) -> None:
    """Add the model, the scores and some translations to the MLflow run that trained it."""
    uri = tracking_uri(root)
    run_id = find_training_run(uri, settings, trained_on["run_key"], root)
    search = {key: getattr(settings.evaluate, key) for key in ("beam", "alpha", "max_extra")}  # it is served by torch
    log_model(uri, run_id, final, root / TOKENIZER / "spm.model", search)
    flat = {"sentences_per_second": evaluation.metrics["sentences_per_second"]}
    for split in ("test", "valid"):
        flat |= {f"{split}_{name}": value for name, value in evaluation.metrics[split].items()}
    num_samples = min(settings.evaluate.num_samples, len(evaluation.sources))
    shown = [len(evaluation.sources) * i // num_samples for i in range(num_samples)]  # from all over the split
    log_evaluation(
        uri,
        settings,
        run_id,
        step=trained_on["step"],
        metrics={name: value for name, value in flat.items() if not isinstance(value, str)},
        tags={name: value for name, value in flat.items() if isinstance(value, str)},
        files=files,
        samples=[
            {
                "source": evaluation.sources[i],
                "reference": evaluation.references[i],
                "translation": evaluation.translations[i].text,
            }
            for i in shown
        ],
    )


def format_scores(metrics: dict[str, Any]) -> str:
    """The metrics for people; each score with its signature below it."""
    test, valid = metrics["test"], metrics["valid"]
    lines = [f"{test['sentences']} test sentences, {metrics['sentences_per_second']:.1f} translated a second"]
    for name, label in SCORE_LABELS.items():
        lines += [f"  {label:58}{test[name]:7.2f}", f"      {test[f'{name}_signature']}"]
    lines += [
        f"  {'length of the output / length of the reference':58}{test['length_ratio']:7.3f}",
        f"  {'outputs cut off before they ended':58}{test['cut_off']:7}",
        f"  {'perplexity per piece: test, validation':58}{test['ppl']:7.3f} {valid['averaged_ppl']:7.3f}",
        f"  {'perplexity per word: test, validation':58}{test['ppl_word']:7.3f} {valid['averaged_ppl_word']:7.3f}",
    ]
    return "\n".join(lines)
