import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.config import BOS, EOS, TransformerConfig
from model.transformer import Transformer
from pipeline.common.checksums import copy_with_sums, write_sums
from pipeline.common.settings import Settings, load_settings
from pipeline.data.dataset import EncodedSplit, EncodedText, load_tokenizer
from pipeline.encode import encode_corpus
from pipeline.evaluate import main
from pipeline.inference.ctranslate2_export import write_export
from pipeline.inference.evaluation import Split, evaluate_model, evaluate_run, perplexities, read_split
from pipeline.inference.metrics import paper_bleu
from pipeline.inference.reports import format_scores, shown_metrics
from pipeline.inference.translate import Translation, translate
from pipeline.train_tokenizer import train_tokenizer
from pipeline.training.checkpoint import load_model, save_model
from tests.factories import update_sums
from tests.support.damage import flip_a_bit

PROJECT = Path(__file__).parents[2]
VOCAB = 331
WHO = [("A man", "Ein Mann"), ("A woman", "Eine Frau"), ("The child", "Das Kind"), ('The "dog"', 'Der "Hund"')]
DOES = [("sings", "singt"), ("reads the book", "liest das Buch"), ("sees the tea-pot", "sieht die Tee-Kanne")]
WHERE = [("", ""), (" in the house", " im Haus"), (" on a rainy day", " an einem Tag voll Regen")]
PAIRS = [
    (f"{who[0]} {does[0]}{where[0]}.", f"{who[1]} {does[1]}{where[1]}.")
    for who in WHO
    for does in DOES
    for where in WHERE
]
SPLITS = {"train": PAIRS, "valid": PAIRS[5::7], "test": PAIRS[::3]}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after the train stage, with an untrained model."""
    root = tmp_path_factory.mktemp("project")
    shutil.copy(PROJECT / "params.yaml", root)
    shutil.copytree(PROJECT / "conf", root / "conf")
    clean = root / "data/clean"
    clean.mkdir(parents=True)
    for split, pairs in SPLITS.items():
        for side, code in enumerate(("en", "de")):
            (clean / f"{split}.{code}").write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
    train_tokenizer(clean / "train.en", clean / "train.de", root / "data/tokenizer", VOCAB)
    encode_corpus(clean, root / "data/tokenizer", root / "data/encoded", "en", "de")
    torch.manual_seed(5)
    config = TransformerConfig(
        vocab_size=VOCAB, num_layers=2, d_model=14, d_ff=17, num_heads=3, d_k=6, d_v=5, dropout=0.1,
        positions="sinusoidal", norm="post", max_length=61,
    )  # fmt: skip
    final = root / "models/final"
    final.mkdir(parents=True)
    save_model(final, Transformer(config).state_dict(), config)
    (final / "run.json").write_text(json.dumps({"run_key": "abc", "step": 600, "mlflow_run_id": "1"}))
    write_sums(final, ["run.json"])
    copy_with_sums(root / "data/tokenizer", final, ["spm.model"], "tokenize")
    return root


@pytest.fixture
def settings(project: Path) -> Settings:
    settings = load_settings(project)
    return replace(settings, evaluate=replace(settings.evaluate, max_extra=7, num_samples=5))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Collect what would be logged to MLflow."""
    logged: dict = {}
    module = "pipeline.inference.reports"
    monkeypatch.setattr(f"{module}.tracking_uri", lambda root: "sqlite:///x.db")
    monkeypatch.setattr(f"{module}.find_training_run", lambda uri, settings, key, root: f"run of {key}")
    monkeypatch.setattr(f"{module}.log_model", lambda *arguments: logged.update(model=arguments))
    monkeypatch.setattr(
        f"{module}.log_evaluation",
        lambda *arguments, **named: logged.update(named, run_id=arguments[2]),
    )
    return logged


def test_perplexities_are_exp_of_the_mean_cross_entropy_per_token_and_word(project: Path):
    model, split = load_model(project / "models/final"), read_split("test", "en", "de", project)
    total, num_tokens, num_words = 0.0, 0, 0
    for i, (_, reference) in enumerate(SPLITS["test"]):
        src = torch.tensor([[*split.tokens.src[i].tolist(), EOS]])
        tgt = torch.tensor([[BOS, *split.tokens.tgt[i].tolist(), EOS]])
        with torch.no_grad():
            logits = model.logits(model(src, tgt[:, :-1]))[0]
        total += float(F.cross_entropy(logits, tgt[0, 1:], reduction="sum"))
        num_tokens += tgt.shape[1] - 1
        num_words += len(reference.split())
    for batch_tokens in (1, 97, 100_000):
        per_piece, per_word = perplexities(model, split, batch_tokens, progress=False)
        assert per_piece == pytest.approx(math.exp(total / num_tokens), rel=1e-4)
        assert math.log(per_word) == pytest.approx(total / num_words, rel=1e-5)


def test_perplexities_leave_out_pairs_too_long_for_the_model(project: Path):
    split = read_split("test", "en", "de", project)
    lengths = [max(len(split.tokens.src[i]), len(split.tokens.tgt[i])) + 1 for i in range(len(split.tokens))]
    limit = sorted(lengths)[len(lengths) // 2]
    model = load_model(project / "models/final")
    config = replace(model.config, max_length=limit)
    short = Transformer(config).eval()
    short.load_state_dict(model.state_dict())
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    assert 0 < len(kept) < len(lengths)
    total = num_words = 0.0
    for i in kept:
        src = torch.tensor([[*split.tokens.src[i].tolist(), EOS]])
        tgt = torch.tensor([[BOS, *split.tokens.tgt[i].tolist(), EOS]])
        with torch.no_grad():
            total += float(F.cross_entropy(model.logits(model(src, tgt[:, :-1]))[0], tgt[0, 1:], reduction="sum"))
        num_words += len(split.references[i].split())
    assert math.log(perplexities(short, split, 4096, progress=False)[1]) == pytest.approx(total / num_words, rel=1e-5)


def test_perplexities_of_a_model_that_gives_no_numbers_are_an_error(project: Path):
    model = load_model(project / "models/final")
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    with pytest.raises(ValueError, match=r"^perplexity, test: the model's loss is nan: train it again with a lower"):
        perplexities(model, read_split("test", "en", "de", project), 4096, progress=False)


def test_evaluate_model_gives_each_score_its_name(project: Path, settings: Settings, monkeypatch):
    """Counts the n-grams of one sentence by hand: with and without case, with the compound whole or split."""
    hypothesis, reference = "a b c d e f g x-i", "A b c d e f g h-i j"
    output = Translation(hypothesis, -1.0, finished=False)
    valid = read_split("valid", "en", "de", project)
    outputs = {1: [output], len(valid.references): [Translation(text, -1.0, True) for text in valid.references]}
    monkeypatch.setattr("pipeline.inference.evaluation.translate", lambda m, t, sources, *more: outputs[len(sources)])
    one = EncodedText(np.array([7, 5, 9, 300], dtype=np.uint16), np.array([0, 4]))
    test = Split("test", "en", "de", EncodedSplit(one, one), ["one two three four five six seven"], [reference])
    model, tokenizer = load_model(project / "models/final"), load_tokenizer(project / "data/tokenizer")
    found = evaluate_model(model, tokenizer, test, valid, settings.evaluate, progress=False)

    metrics = found.metrics["test"]
    shorter = math.exp(1 - 9 / 8)  # brevity penalty: 8 tokens, reference 9
    assert metrics["bleu"] == pytest.approx(100 * shorter * (6 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25)
    assert metrics["bleu_lowercase"] == pytest.approx(100 * shorter * (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25)
    split = math.exp(1 - 11 / 10)  # a compound is two parts and the mark between them
    assert metrics["bleu_paper"] == pytest.approx(100 * split * (8 / 10 * 6 / 9 * 4 / 8 * 3 / 7) ** 0.25)
    matches = {1: 8, 2: 6, 3: 4, 4: 3, 5: 2, 6: 1}  # by n; 10 and 11 characters without spaces
    precision = sum(number / (11 - n) for n, number in matches.items()) / 6
    recall = sum(number / (12 - n) for n, number in matches.items()) / 6
    assert metrics["chrf"] == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    marks = {"bleu": "tok:13a", "bleu_paper": "compounds:split", "bleu_lowercase": "case:lc", "chrf": "nc:6"}
    for name, mark in marks.items():
        assert mark in metrics[f"{name}_signature"]
    assert (metrics["sentences"], metrics["cut_off"], metrics["length_ratio"]) == (1, 1, 8 / 9)
    assert found.by_length == [{"source_words": 10, "num_sentences": 1, "bleu": metrics["bleu"]}]
    assert (metrics["ppl"], metrics["ppl_word"]) == perplexities(model, test, 4096, progress=False)
    of_valid = found.metrics["valid"]
    assert set(of_valid) == {f"averaged_{name}" for name in metrics}
    found_ppl = of_valid["averaged_ppl"], of_valid["averaged_ppl_word"]
    assert found_ppl == perplexities(model, valid, 4096, progress=False)
    assert of_valid["averaged_bleu"] == pytest.approx(100)  # the outputs are the references
    assert (of_valid["averaged_chrf"], of_valid["averaged_cut_off"]) == (pytest.approx(100), 0)


def test_scores_on_moses_tokens_are_left_out_where_moses_has_no_such_language(project: Path, settings, monkeypatch):
    valid = replace(read_split("valid", "en", "de", project), tgt="ja")
    outputs = [Translation(text, -1.0, True) for text in valid.references]
    monkeypatch.setattr("pipeline.inference.evaluation.translate", lambda *_: outputs)
    model, tokenizer = load_model(project / "models/final"), load_tokenizer(project / "data/tokenizer")
    found = evaluate_model(model, tokenizer, replace(valid, name="test"), valid, settings.evaluate, progress=False)
    assert not {"bleu_paper", "bleu_lowercase"} & found.metrics["test"].keys()
    assert "|tok:char|" in found.metrics["test"]["bleu_signature"]
    assert shown_metrics(found.metrics).keys() == {"bleu", "ppl"}
    assert "Moses" not in format_scores(found.metrics)


def test_format_scores_names_no_compounds_and_no_corpus_where_they_do_not_apply():
    names = ("bleu", "bleu_paper", "bleu_lowercase", "length_ratio", "cut_off", "ppl", "ppl_word")
    of_test = dict.fromkeys(names, 1) | {"sentences": 3}
    of_test |= {f"{name}_signature": paper_bleu(["Un."], ["Un."], "fr").signature for name in names[:3]}
    of_valid = {f"averaged_{name}": value for name, value in of_test.items()}
    shown = format_scores({"test": of_test, "valid": of_valid, "sentences_per_second": 1.0})
    assert [line[:41].strip() for line in shown.splitlines() if "BLEU on" in line] == [
        "BLEU on Moses tokens", "BLEU on lower-cased Moses tokens"
    ]  # fmt: skip
    assert "Multi30k" not in shown


def test_translate_searches_by_the_engine_of_the_settings(project: Path, settings: Settings):
    model, tokenizer = load_model(project / "models/final"), load_tokenizer(project / "data/tokenizer")
    sources = read_split("test", "en", "de", project).tokens.src
    scores = set()
    for engine in ("torch", "ctranslate2", "ctranslate2-int8"):
        chosen = replace(settings.evaluate, engine=engine)
        found = translate(model, tokenizer, sources, chosen, progress=False)
        scores.add(tuple(best.score for best in found))
    assert len(scores) == 3  # they differ by PAD and BOS in the softmax, and by rounding


def test_evaluate_exports_the_model_once_for_both_splits(
    project: Path, settings: Settings, mlflow: dict, monkeypatch: pytest.MonkeyPatch
):
    module = "pipeline.inference.ctranslate2_engine.write_export"
    exports = []
    monkeypatch.setattr(module, lambda *arguments: exports.append(arguments) or write_export(*arguments))
    evaluate_run(replace(settings, evaluate=replace(settings.evaluate, engine="ctranslate2")), project)
    assert len(exports) == 1


def test_evaluate_run_writes_reports_and_logs_to_mlflow(project: Path, settings: Settings, mlflow: dict):
    found = evaluate_run(settings, project)
    reports = project / "reports"
    assert json.loads((reports / "evaluation.json").read_text()) == found.metrics
    for name, split, texts in (
        ("translations_valid.tsv", found.valid, SPLITS["valid"]),
        ("translations.tsv", found.test, SPLITS["test"]),
    ):
        with open(reports / name, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert [(row["source"], row["reference"]) for row in rows] == texts
        assert [row["translation"] for row in rows] == [translation.text for translation in split.translations]
        assert float(rows[0]["score"]) == pytest.approx(split.translations[0].score, abs=1e-4)
    with open(reports / "bleu_by_length.csv", encoding="utf-8", newline="") as file:
        by_length = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in by_length] == found.by_length
    assert sorted(path.name for path in reports.iterdir()) == [
        "bleu_by_length.csv", "evaluation.json", "translations.tsv", "translations_valid.tsv",
    ]  # fmt: skip

    assert mlflow["run_id"] == "run of abc"
    assert mlflow["metrics"]["test_bleu"] == found.metrics["test"]["bleu"]
    assert mlflow["metrics"]["valid_averaged_ppl"] == found.metrics["valid"]["averaged_ppl"]
    assert all(isinstance(value, (int, float)) for value in mlflow["metrics"].values())
    assert mlflow["tags"]["bleu_signature"] == found.metrics["test"]["bleu_signature"]
    assert sorted(mlflow["files"]) == sorted(reports.iterdir())
    assert len(mlflow["samples"]) == 5
    for sample in mlflow["samples"]:
        row = next(row for row in rows if row["source"] == sample["source"])
        assert sample == {key: row[key] for key in ("source", "reference", "translation")}
    assert mlflow["model"][2:] == (project / "models/final", {"beam": 4, "alpha": 0.6, "max_extra": 7})

    shown = format_scores(found.metrics)
    assert "  BLEU on Moses tokens, compounds split, as the paper's   " in shown
    for name in ("bleu", "bleu_paper", "bleu_lowercase", "chrf"):
        assert f"{found.metrics['test'][name]:.2f}" in shown
        assert found.metrics["test"][f"{name}_signature"] in shown


def test_evaluate_run_warns_of_sources_that_are_cut(
    project: Path, settings: Settings, mlflow: dict, capsys, tmp_path: Path
):
    root = shutil.copytree(project, tmp_path / "project")
    model = load_model(root / "models/final")
    longest = read_split("test", "en", "de", root).tokens.src.lengths.max()
    config = replace(model.config, max_length=int(longest))
    save_model(root / "models/final", model.state_dict(), config)
    evaluate_run(settings, root)
    assert f"test sentences have {longest} tokens (model.max_length) or more and are cut" in capsys.readouterr().err


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[Path], str]:
    """Return a function that runs the command in a project and returns its last error line."""

    def ends(root: Path) -> str:
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", ["evaluate"])
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # the number would stay set after the test
        with pytest.raises(SystemExit, match=r"^1$"):
            main()
        return capsys.readouterr().err.splitlines()[-1]

    return ends


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "models/final/weights.safetensors",
            "evaluate: models/final/weights.safetensors does not exist: run the train",
        ),
        ("models/final/run.json", "evaluate: models/final/run.json does not exist: run the train stage first"),
        ("data/tokenizer/spm.model", "evaluate: data/tokenizer/spm.model does not exist: run the tokenize"),
        ("data/encoded/test.src.ids.npy", "evaluate: data/encoded/test.src.ids.npy does not exist: run the tokenize"),
        ("models/final/spm.model", "evaluate: models/final/spm.model does not exist: run the train stage first"),
        ("data/clean/valid.de", "evaluate: data/clean/valid.de does not exist: run the validate stage first"),
    ],
)
def test_evaluate_reports_a_missing_input_in_one_line(project: Path, tmp_path: Path, fault, lost: str, message: str):
    root = shutil.copytree(project, tmp_path / "project")
    (root / lost).unlink()
    line = fault(root)
    assert line.startswith(message)


def test_evaluate_refuses_the_tokenizer_of_another_model(project: Path, tmp_path: Path, fault):
    root = shutil.copytree(project, tmp_path / "project")
    train_tokenizer(root / "data/clean/train.en", root / "data/clean/train.de", root / "data/tokenizer", 323)
    assert fault(root) == (
        "evaluate: the tokenizer in data/tokenizer is not the one in models/final: run the train stage again"
    )


def test_evaluate_refuses_text_that_is_not_the_encoded_one(project: Path, tmp_path: Path, fault):
    root = shutil.copytree(project, tmp_path / "project")
    with open(root / "data/clean/test.de", "a") as file:
        file.write("Noch ein Satz.\n")
    assert fault(root).startswith(
        "evaluate: data/clean/test.de is not the text that data/encoded was made from: it is"
    )


@pytest.mark.parametrize("name", ["test.en", "test.de", "valid.en", "valid.de"])
def test_evaluate_refuses_a_damaged_text(project: Path, tmp_path: Path, fault, name: str):
    root = shutil.copytree(project, tmp_path / "project")
    flip_a_bit(root / "data/clean" / name)
    assert fault(root).startswith(f"evaluate: data/clean/{name} is not the text that data/encoded was made from")


def test_evaluate_names_a_damaged_run_json(project: Path, tmp_path: Path, fault):
    root = shutil.copytree(project, tmp_path / "project")
    (root / "models/final/run.json").write_text('{"run_key": ')
    assert fault(root).startswith("evaluate: models/final/run.json is damaged (its checksum differs from")
    update_sums(root / "models/final")
    line = fault(root)
    assert line.startswith("evaluate: models/final/run.json is damaged (JSONDecodeError")
