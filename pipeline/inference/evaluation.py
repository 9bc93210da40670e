"""Evaluate a trained model: translate the test and validation splits, score them, compute perplexities, report."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from model.perplexity import cross_entropy, perplexity
from model.transformer import Transformer
from pipeline.common.checksums import verify
from pipeline.common.languages import num_words
from pipeline.common.paths import FINAL, REPORTS, TOKENIZER
from pipeline.common.settings import Evaluate, Settings
from pipeline.data.batching import MicroBatch, batches_to_read, collate
from pipeline.data.dataset import load_tokenizer
from pipeline.inference.metrics import (
    bleu_by_length,
    chrf,
    length_ratio,
    lowercase_bleu,
    moses_knows,
    paper_bleu,
    sacre_bleu,
)
from pipeline.inference.reports import Evaluation, Translated, log_to_mlflow, write_reports
from pipeline.inference.split import Split, read_split
from pipeline.inference.trained_model import load_trained
from pipeline.inference.translate import Translation, engine_of, translate

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def evaluate_run(
    settings: Settings, root: Path = Path(), final: Path = FINAL, reports: Path = REPORTS, progress: bool = True
) -> Evaluation:
    """Evaluate the model in `root` / `final`, write the reports, and add them to the MLflow run that trained it.

    Raises ValueError with a one-line message if the model, its tokenizer or the texts are damaged or do not match.
    """
    model, tokenizer = load_trained(root / final)
    trained_on = read_run(root / final)
    if load_tokenizer(root / TOKENIZER).serialized_model_proto() != tokenizer.serialized_model_proto():
        raise ValueError(
            f"the tokenizer in {root / TOKENIZER} is not the one in {root / final}: run the train stage again"
        )
    languages = settings.data.src, settings.data.tgt
    test, valid = (read_split(name, *languages, root) for name in ("test", "valid"))
    too_long = int((test.tokens.src.lengths >= model.config.max_length).sum())
    if too_long:
        warning = (
            f"{too_long} test sentences have {model.config.max_length} tokens (model.max_length) or more and are cut"
        )
        tqdm.write(f"evaluate: {warning}", file=sys.stderr)
    if torch.cuda.is_available():
        model = model.cuda()
    if not moses_knows(settings.data.tgt):
        line = f"Moses' tokenizer has no rules for {settings.data.tgt!r}: the BLEUs on its tokens are left out"
        tqdm.write(f"evaluate: {line}", file=sys.stderr)
    evaluation = evaluate_model(model, tokenizer, test, valid, settings.evaluate, progress)
    files = write_reports(evaluation, root / reports)
    log_to_mlflow(evaluation, files, settings, trained_on, root, root / final)
    return evaluation


def evaluate_model(
    model: Transformer,
    tokenizer: "SentencePieceProcessor",
    test: Split,
    valid: Split,
    settings: Evaluate,
    progress: bool = True,
) -> Evaluation:
    """Translate and score both splits, and compute their perplexities."""
    started = time.perf_counter()
    engine = engine_of(model, tokenizer, settings)
    translations = {
        split.name: translate(
            model, tokenizer, split.tokens.src, settings, progress, f"translate, {split.name}", engine
        )
        for split in (test, valid)
    }
    seconds = time.perf_counter() - started
    test_ppl, test_ppl_word = perplexities(model, test, settings.batch_tokens, progress)
    valid_ppl, valid_ppl_word = perplexities(model, valid, settings.batch_tokens, progress)
    of_valid = _scores(valid, translations["valid"]) | {"ppl": valid_ppl, "ppl_word": valid_ppl_word}
    metrics = {
        "test": _scores(test, translations["test"]) | {"ppl": test_ppl, "ppl_word": test_ppl_word},
        # "averaged", because the final weights are an average; train.json has the perplexity of the last step's
        "valid": {f"averaged_{name}": value for name, value in of_valid.items()},
        "sentences_per_second": sum(map(len, translations.values())) / seconds,
    }
    outputs = [translation.text for translation in translations["test"]]
    by_length = bleu_by_length(test.sources, outputs, test.references, test.src, test.tgt)
    return Evaluation(
        metrics,
        by_length,
        test=Translated(test.sources, test.references, translations["test"]),
        valid=Translated(valid.sources, valid.references, translations["valid"]),
    )


def _scores(split: Split, translations: list[Translation]) -> dict[str, Any]:
    """Return each score and its signature; scores on Moses tokens only if Moses has rules for the language."""
    outputs = [translation.text for translation in translations]
    found = {"bleu": sacre_bleu(outputs, split.references, split.tgt)}
    if moses_knows(split.tgt):
        found["bleu_paper"] = paper_bleu(outputs, split.references, split.tgt)
        found["bleu_lowercase"] = lowercase_bleu(outputs, split.references, split.tgt)
    found["chrf"] = chrf(outputs, split.references)
    metrics: dict[str, Any] = {"sentences": len(outputs)}
    for name, score in found.items():
        metrics |= {name: score.value, f"{name}_signature": score.signature}
    cut_off = sum(not translation.finished for translation in translations)
    return metrics | {"length_ratio": length_ratio(outputs, split.references, split.tgt), "cut_off": cut_off}


def perplexities(model: Transformer, split: Split, batch_tokens: int, progress: bool = True) -> tuple[float, float]:
    """Return the perplexity per token (EOS included) and per word of the reference: exp of the mean of -ln p, without
    label smoothing.

    Both have the same sum of -ln p, EOS included, so the perplexity per word compares models with different
    vocabularies. Words are counted by `num_words`. Pairs longer than max_length are left out. Raises ValueError if
    the loss is not finite.
    """
    longest = model.config.max_length
    src, tgt = split.tokens.src.lengths, split.tokens.tgt.lengths
    budget = max(batch_tokens, longest)
    batches = batches_to_read(src, tgt, micro_batch_tokens=budget, max_length=longest)
    words = sum(num_words(split.references[i], split.tgt) for indices in batches for i in indices)
    label = f"perplexity, {split.name}"

    def collated() -> Iterator[MicroBatch]:
        with tqdm(total=len(src), desc=label, unit=" sentences", disable=not progress) as bar:
            for indices in batches:
                yield collate(split.tokens, indices)
                bar.update(len(indices))

    total, num_tokens = cross_entropy(model, collated())
    if not math.isfinite(total):
        raise ValueError(f"{label}: the model's loss is {total}: train it again with a lower train.lr_scale")
    return perplexity(total, num_tokens), perplexity(total, max(1, words))


def read_run(folder: Path) -> dict[str, Any]:
    """Read `folder`/run.json: the key of the run that trained the model, and its step. Raises ValueError if the file
    is missing or damaged."""
    path = folder / "run.json"
    verify(folder, [path.name], "train")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"run_key": str(values["run_key"]), "step": int(values["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): run the train stage again") from None
