"""The results of an evaluation: files in reports/, a table for the terminal, scores and samples in MLflow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_csv, write_json, write_text
from pipeline.common.settings import Settings
from pipeline.common.storage import tracking_uri
from pipeline.inference.translate import Translation
from pipeline.tracking.results import find_training_run, log_evaluation, log_model

SCORE_LABELS = {
    "bleu": "sacreBLEU (detokenised; compare with others' sacreBLEU)",
    "bleu_paper": "BLEU on Moses tokens",
    "bleu_lowercase": "BLEU on lower-cased Moses tokens",
    "chrf": "chrF2",
}
COMPOUNDS = "compounds:split", ", compounds split, as the paper's"
"""In the signature of a score, and behind its label."""

TRANSLATIONS, VALID_TRANSLATIONS = "translations.tsv", "translations_valid.tsv"


@dataclass(frozen=True)
class Translated:
    """The sentences of a split: one entry of each list per sentence."""

    sources: list[str]
    references: list[str]
    translations: list[Translation]


@dataclass(frozen=True)
class Evaluation:
    """The content of the reports: `metrics` of evaluation.json, `by_length` of bleu_by_length.csv, translations."""

    metrics: dict[str, Any]
    by_length: list[dict[str, float]]
    test: Translated
    valid: Translated


def write_reports(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json, bleu_by_length.csv and the translations of both splits; return their paths."""
    names = ("evaluation.json", "bleu_by_length.csv", TRANSLATIONS, VALID_TRANSLATIONS)
    paths = [folder / name for name in names]
    write_json(paths[0], evaluation.metrics)
    write_csv(paths[1], evaluation.by_length)
    _write_translations(paths[2], evaluation.test)
    _write_translations(paths[3], evaluation.valid)
    return paths


def _write_translations(path: Path, split: Translated) -> None:
    lines = ["source\treference\ttranslation\tscore"]
    for source, reference, best in zip(split.sources, split.references, split.translations, strict=True):
        columns = (" ".join(text.split()) for text in (source, reference, best.text))  # without tabs
        lines.append("\t".join((*columns, f"{best.score:.4f}")))
    write_text(path, "\n".join(lines) + "\n")


def shown_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The few metrics that `dvc metrics show` prints on one screen: BLEU and perplexity of the test split."""
    test = metrics["test"]
    names = {"bleu": "bleu", "bleu_paper": "bleu_paper", "bleu_lc": "bleu_lowercase", "ppl": "ppl"}
    return {short: round(test[name], 3) for short, name in names.items() if name in test}


def log_to_mlflow(
    evaluation: Evaluation,
    files: list[Path],
    settings: Settings,
    trained_on: dict[str, Any],
    root: Path,
    final: Path,
) -> None:
    """Add the model, the scores and some translations to the MLflow run that trained the model."""
    uri = tracking_uri(root)
    run_id = find_training_run(uri, settings, trained_on["run_key"], root)
    search = {key: getattr(settings.evaluate, key) for key in ("beam", "alpha", "max_extra")}  # torch serves it
    log_model(uri, run_id, final, search)
    flat = {"sentences_per_second": evaluation.metrics["sentences_per_second"]}
    for split in ("test", "valid"):
        flat |= {f"{split}_{name}": value for name, value in evaluation.metrics[split].items()}
    test = evaluation.test
    num_samples = min(settings.evaluate.num_samples, len(test.sources))
    shown = [len(test.sources) * i // num_samples for i in range(num_samples)]  # evenly spaced
    log_evaluation(
        uri,
        settings,
        run_id,
        metrics={name: value for name, value in flat.items() if not isinstance(value, str)},
        tags={"bleu_signature": evaluation.metrics["test"]["bleu_signature"]},
        files=files,
        samples=[
            {
                "source": test.sources[i],
                "reference": test.references[i],
                "translation": test.translations[i].text,
            }
            for i in shown
        ],
    )


def format_scores(metrics: dict[str, Any]) -> str:
    """Format the metrics as a table, each score with its signature below it."""
    test, valid = metrics["test"], metrics["valid"]
    counts = f"{test['sentences']} test and {valid['averaged_sentences']} validation sentences"
    lines = [
        f"{counts}, {metrics['sentences_per_second']:.1f} translated per second",
        f"  {'':56}{'test':>11}{'valid':>11}",
    ]

    def line(label: str, name: str, form: str) -> str:
        return f"  {label:56}{test[name]:{form}}{valid[f'averaged_{name}']:{form}}"

    for name, label in SCORE_LABELS.items():
        if name in test:
            signature = test[f"{name}_signature"]
            more = COMPOUNDS[1] if COMPOUNDS[0] in signature else ""
            lines += [line(label + more, name, "11.2f"), f"      {signature}"]
    return "\n".join(
        [
            *lines,
            line("length of the output / length of the reference", "length_ratio", "11.3f"),
            line("outputs cut off before they ended", "cut_off", "11"),
            line("perplexity per token", "ppl", "11.4g"),
            line("perplexity per word", "ppl_word", "11.4g"),
        ]
    )
