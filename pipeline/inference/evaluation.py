"""Translate a split, score it, write the reports, log them."""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from model.perplexity import cross_entropy, perplexity
from model.transformer import Transformer
from pipeline.common.atomic_io import write_csv, write_json, write_text
from pipeline.common.paths import CLEAN, ENCODED, FINAL, REPORTS, TOKENIZER
from pipeline.common.settings import Evaluate, Settings
from pipeline.common.storage import tracking_uri
from pipeline.data.batching import MicroBatch, batches_to_read, collate
from pipeline.data.dataset import EncodedSplit, load_tokenizer
from pipeline.inference import metrics as scoring
from pipeline.inference.translate import Translation, translate
from pipeline.tracking.results import find_training_run, log_evaluation, log_model
from pipeline.training.checkpoint import load_model

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@dataclass(frozen=True)
class Split:
    """Sentence pairs as pieces and as text."""

    name: str
    pieces: EncodedSplit
    sources: list[str]
    references: list[str]


@dataclass(frozen=True)
class Evaluation:
    """`metrics` and `by_length` as they stand in the reports, and a translation for every sentence."""

    metrics: dict[str, Any]
    by_length: list[dict[str, float]]
    translations: list[Translation]


def evaluate(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    test: Split,
    valid: Split,
    tgt: str,
    settings: Evaluate,
    progress: bool = True,
) -> Evaluation:
    """Translate and score `test`, whose target language is `tgt`; perplexities of both splits."""
    started = time.perf_counter()
    if settings.engine == "torch":
        translations = translate(model, tokenizer, test.pieces.src, settings, progress)
    else:
        from pipeline.inference.ctranslate2_engine import (
            translate_ctranslate2,  # here, so that torch's search needs torch alone
        )

        translations = translate_ctranslate2(model, tokenizer, test.pieces.src, settings, progress)
    seconds = time.perf_counter() - started
    outputs = [translation.text for translation in translations]
    scores = {
        "bleu": scoring.sacre_bleu(outputs, test.references),
        "bleu_paper": scoring.paper_bleu(outputs, test.references, tgt),
        "bleu_lowercase": scoring.lowercase_bleu(outputs, test.references, tgt),
        "chrf": scoring.chrf(outputs, test.references),
    }
    test_metrics: dict[str, Any] = {"sentences": len(outputs)}
    for name, score in scores.items():
        test_metrics |= {name: score.value, f"{name}_signature": score.signature}
    test_metrics["length_ratio"] = scoring.length_ratio(outputs, test.references)
    test_metrics["cut_off"] = sum(not translation.finished for translation in translations)
    test_metrics["ppl"], test_metrics["ppl_word"] = perplexities(model, test, settings.batch_tokens, progress)
    valid_ppl, valid_ppl_word = perplexities(model, valid, settings.batch_tokens, progress)
    metrics = {
        "test": test_metrics,
        "valid": {"averaged_ppl": valid_ppl, "averaged_ppl_word": valid_ppl_word},  # train.json has the last step's
        "sentences_per_second": len(outputs) / seconds,
    }
    return Evaluation(metrics, scoring.bleu_by_length(test.sources, outputs, test.references), translations)


def perplexities(model: Transformer, split: Split, batch_tokens: int, progress: bool = True) -> tuple[float, float]:
    """exp of the mean of -ln p, without smoothing, per piece (EOS is one) and per word of the reference.

    Words are what white space separates. The second figure has the same numerator, EOS and all, so it compares
    models of different vocabularies. Pairs longer than max_length are left out.
    """
    longest = model.config.max_length
    src, tgt = split.pieces.src.lengths, split.pieces.tgt.lengths
    budget = max(batch_tokens, longest)
    batches = batches_to_read(src, tgt, micro_batch_tokens=budget, max_length=longest)
    num_words = sum(len(split.references[i].split()) for indices in batches for i in indices)
    label = f"perplexity, {split.name}"

    def collated() -> Iterator[MicroBatch]:
        with tqdm(total=len(src), desc=label, unit=" sentences", disable=not progress) as bar:
            for indices in batches:
                yield collate(split.pieces, indices)
                bar.update(len(indices))

    total, num_pieces = cross_entropy(model, collated())
    if not math.isfinite(total):
        raise ValueError(f"{label}: the model's loss is {total}; train it anew with a lower train.lr_scale")
    return perplexity(total, num_pieces), perplexity(total, max(1, num_words))


def read_split(name: str, src: str, tgt: str, root: Path = Path()) -> Split:
    """Raises ValueError if text and pieces do not belong together."""
    pieces = EncodedSplit.open(root / ENCODED, name)
    texts = []
    for code in (src, tgt):
        path = root / CLEAN / f"{name}.{code}"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: run the validate stage first")
        texts.append(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
        if len(texts[-1]) != len(pieces):
            raise ValueError(
                f"{path} has {len(texts[-1])} lines, {root / ENCODED} {len(pieces)} sentences: "
                "run the tokenize stage again"
            )
    return Split(name, pieces, *texts)


def run(
    settings: Settings, root: Path = Path(), final: Path = FINAL, reports: Path = REPORTS, progress: bool = True
) -> Evaluation:
    """The stage: read the model in `root` / `final`, evaluate, write the reports, tell MLflow. Raises ValueError with
    one line."""
    model, tokenizer = load_model(root / final), load_tokenizer(root / TOKENIZER)
    trained_on = read_run(root / final)
    if tokenizer.get_piece_size() != model.config.vocab_size:
        raise ValueError(
            f"{root / TOKENIZER} has {tokenizer.get_piece_size()} pieces, {root / final} was trained with "
            f"{model.config.vocab_size}: run the train stage again"
        )
    languages = settings.download.src, settings.download.tgt
    test, valid = (read_split(name, *languages, root) for name in ("test", "valid"))
    too_long = int((test.pieces.src.lengths >= model.config.max_length).sum())
    if too_long:
        say(f"{too_long} test sentences have {model.config.max_length} pieces (model.max_length) or more and are cut")
    if torch.cuda.is_available():
        model = model.cuda()
    evaluation = evaluate(model, tokenizer, test, valid, settings.download.tgt, settings.evaluate, progress)
    files = write_reports(evaluation, test, root / reports)
    log(evaluation, test, files, settings, trained_on, root, root / final)
    return evaluation


def read_run(folder: Path) -> dict[str, Any]:
    """run.json: which run trained the model."""
    path = folder / "run.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"run_key": str(values["run_key"]), "step": int(values["step"])}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the train stage first (dvc repro train)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): run the train stage again") from None


def write_reports(evaluation: Evaluation, test: Split, folder: Path) -> list[Path]:
    """Returns the files written."""
    paths = [folder / name for name in ("evaluation.json", "bleu_by_length.csv", "translations.tsv")]
    write_json(paths[0], evaluation.metrics)
    write_csv(paths[1], evaluation.by_length)
    lines = ["source\treference\ttranslation\tscore"]
    for source, reference, best in zip(test.sources, test.references, evaluation.translations, strict=True):
        columns = (" ".join(text.split()) for text in (source, reference, best.text))  # no tab within one
        lines.append("\t".join((*columns, f"{best.score:.4f}")))
    write_text(paths[2], "\n".join(lines) + "\n")
    return paths


def log(
    evaluation: Evaluation,
    test: Split,
    files: list[Path],
    settings: Settings,
    trained_on: dict[str, Any],
    root: Path,
    final: Path,
) -> None:
    """Add the model, the scores and some translations to the MLflow run that trained."""
    uri = tracking_uri(root)
    run_id = find_training_run(uri, settings, trained_on["run_key"], root)
    search = {key: getattr(settings.evaluate, key) for key in ("beam", "alpha", "max_extra")}  # it is served by torch
    log_model(uri, run_id, final, root / TOKENIZER / "spm.model", search)
    flat = {"sentences_per_second": evaluation.metrics["sentences_per_second"]}
    for split in ("test", "valid"):
        flat |= {f"{split}_{name}": value for name, value in evaluation.metrics[split].items()}
    num_samples = min(settings.evaluate.num_samples, len(test.sources))
    shown = [len(test.sources) * i // num_samples for i in range(num_samples)]  # from all over the split
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
                "source": test.sources[i],
                "reference": test.references[i],
                "translation": evaluation.translations[i].text,
            }
            for i in shown
        ],
    )


def say(line: str) -> None:
    tqdm.write(f"evaluate: {line}", file=sys.stderr)
