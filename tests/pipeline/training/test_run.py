"""A run's key, and the files that a finished run leaves."""

import ast
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from upath import UPath

from model.transformer import Transformer
from pipeline.common.checksums import verify, write_sums
from pipeline.common.paths import ENCODED, TOKENIZER
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState, adam
from pipeline.training.run import WEIGHTS_CODE, TrainResult, log_how_it_starts, run_folder, run_key, write_model
from pipeline.training.siblings import Origin
from tests.factories import config, edit_corpus, settings, write_corpus
from tests.support.imports import REPOSITORY, does_something, reached

SETTINGS = settings()

DECIDES_NO_WEIGHTS = {
    "pipeline/__init__.py": "turns off usage reports of libraries",
    "pipeline/common/atomic_io.py": "how files are written; checksums detect other bytes",
    "pipeline/common/checksums.py": "refuses damaged data, and changes none",
    "pipeline/common/cli.py": "how a command ends",
    "pipeline/common/environment.py": "names of environment variables",
    "pipeline/common/paths.py": "where files are",
    "pipeline/common/presets.py": "only names presets",
    "pipeline/common/retry.py": "when a request to a store is repeated",
    "pipeline/common/settings.py": "its values are in the key",
    "pipeline/common/storage.py": "where files are; checksums detect other bytes",
    "pipeline/common/yaml_files.py": "reads settings, which are in the key",
    "pipeline/training/checkpoint.py": "a test checks that a resume gives the weights of undisturbed training",
}
"""Files that trainer.py imports, directly or not, but that a run's key does not depend on."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a project after the tokenize stage that a run's key depends on."""
    for file in WEIGHTS_CODE:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, tmp_path / file)
    write_corpus(tmp_path / ENCODED)
    (tmp_path / TOKENIZER).mkdir()
    (tmp_path / TOKENIZER / "spm.model").write_bytes(b"pieces")
    write_sums(tmp_path / TOKENIZER, ["spm.model"])
    return tmp_path


def test_weights_code_is_what_training_imports_that_decides_weights():
    imported = {file for file in reached(["pipeline/training/trainer.py"]) if does_something(file)}
    counted = set(WEIGHTS_CODE)
    assert not counted & set(DECIDES_NO_WEIGHTS)
    missing = imported - counted - set(DECIDES_NO_WEIGHTS)
    assert not missing, "add it to WEIGHTS_CODE of pipeline/training/run.py, or to DECIDES_NO_WEIGHTS with a reason"
    superfluous = (counted | set(DECIDES_NO_WEIGHTS)) - imported
    assert not superfluous, "training does not import this: remove it from the list"


def edited(root: Path, file: str, before: str, after: str) -> str:
    """Return the run's key with this text of a file replaced."""
    source = (root / file).read_text()
    assert before in source
    (root / file).write_text(source.replace(before, after))
    key = run_key(SETTINGS, root)
    (root / file).write_text(source)
    return key


@pytest.mark.parametrize("file", WEIGHTS_CODE)
def test_run_key_ignores_comments_docstrings_and_formatting(root, file):
    source = (root / file).read_text()
    key = run_key(SETTINGS, root)
    docstring = ast.get_docstring(ast.parse(source), clean=False) or '"""'
    assert edited(root, file, docstring, f"{docstring} And more.") == key
    (root / file).write_text(source + "\n\n# A remark.\n")
    assert run_key(SETTINGS, root) == key
    (root / file).write_text(ast.unparse(ast.parse(source)))  # without comments, reformatted
    assert run_key(SETTINGS, root) == key


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("pipeline/training/loop.py", "settings.max_grad_norm / norm_value", "settings.max_grad_norm * norm_value"),
        ("pipeline/training/loop.py", "/ batch.num_tokens", "// batch.num_tokens"),
        ("pipeline/training/threads.py", "MIN_EFFICIENCY = 0.85", "MIN_EFFICIENCY = 0.9"),
        ("model/schedule.py", "min(", "max("),
    ],
)
def test_run_key_changes_with_an_operator_or_a_constant(root, file, before, after):
    assert edited(root, file, before, after) != run_key(SETTINGS, root)


def test_run_key_names_code_that_is_missing(root):
    (root / WEIGHTS_CODE[0]).unlink()
    with pytest.raises(ValueError, match=r"config\.py does not exist"):
        run_key(SETTINGS, root)


@pytest.mark.parametrize(
    ("changed", "is_another_run"),
    [
        (SETTINGS.with_seed(SETTINGS.seed + 1), True),
        (settings(model={"d_ff": 19}), True),
        (settings(train={"eps": 1e-8}), True),
        (settings(hardware={"precision": "bf16"}), True),
        (settings(hardware={"micro_batch_tokens": 61}), True),
        (settings(hardware={"num_workers": 3, "device": "cpu", "compile": True, "max_failures": 7}), False),
        (replace(SETTINGS, evaluate=replace(SETTINGS.evaluate, beam=7)), False),
        (settings(train={"max_steps": 10}), True),
        (settings(train={"patience": 3}), True),
        (settings(train={"log_every": 3, "keep_checkpoints": 3, "average_checkpoints": 1}), False),
        (settings(train={"bleu_sentences": 7}), False),
    ],
)
def test_run_key_changes_with_the_settings_that_decide_the_weights(root, changed, is_another_run):
    assert (run_key(changed, root) != run_key(SETTINGS, root)) == is_another_run


def test_run_key_is_the_trajectory_and_where_it_ends(root):
    trajectory, _, end = run_key(SETTINGS, root).partition("-")
    assert len(trajectory) == 12
    assert end == "9"
    assert run_key(settings(train={"max_steps": 10}), root) == f"{trajectory}-10"
    assert run_key(settings(train={"patience": 3}), root) == f"{trajectory}-9-p3"
    shorter = {"log_every": 3, "keep_checkpoints": 3, "average_checkpoints": 1}
    assert run_key(settings(train=shorter), root) == f"{trajectory}-9"
    assert not run_key(settings(train={"validate_every": 5}), root).startswith(trajectory)


def test_run_key_changes_with_the_corpus(root):
    before = run_key(SETTINGS, root)
    edit_corpus(root / ENCODED, sha256="1" * 64)
    assert run_key(SETTINGS, root) != before


def test_run_folder_is_in_the_run_storage_and_named_after_the_run(root, monkeypatch):
    name = f"{SETTINGS.data_name}-{SETTINGS.model_name}-{SETTINGS.seed}-the key"
    assert run_folder(SETTINGS, root, "the key") == root / "checkpoints" / name
    monkeypatch.setenv("RUN_STORAGE", "s3://bucket/runs")
    assert str(run_folder(SETTINGS, root, "the key")) == str(UPath("s3://bucket/runs") / "checkpoints" / name)


# --- checkpoints of a run


def write_checkpoint(folder: Path, step: int, finished: bool = False) -> Path:
    torch.manual_seed(step)
    model = Transformer(SETTINGS.model.config(config().vocab_size))
    optimizer = adam(model, 0.9, 0.98, 1e-9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    valid = {"step": step, "valid_loss": 1.5, "valid_ppl": 4.5, "valid_ppl_word": 9.5}
    state = TrainState(step=step, tokens=700, seconds=2.0, finished=finished)
    state.training_curve, state.validation_curve = [{"step": step, "train_loss": 2.5}], [valid]
    return checkpoint.save(folder, model, optimizer, state, {}, keep=5, every=3)


def test_log_how_it_starts_names_the_run_that_continues_or_the_last(tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    log_how_it_starts(first, None)
    assert capsys.readouterr().err == ""
    for folder, time in ((first, 1_000), (second, 2_000)):
        write_checkpoint(folder, 3)
        os.utime(folder, (time, time))
    log_how_it_starts(first, None)
    assert capsys.readouterr().err == "train: settings, data and code are the same as in first\n"
    (tmp_path / "newest, but no run").mkdir()
    log_how_it_starts(third, None)
    assert "a new run: settings, data or code differ from the last run, second" in capsys.readouterr().err
    log_how_it_starts(third, Origin(second, 3, 1.0))
    assert capsys.readouterr().err == (
        "train: third continues from second, trained to step 3: the runs differ only in where they end\n"
    )


def test_write_model_averages_the_last_checkpoints_and_returns_the_metrics(root, tmp_path):
    folder = tmp_path / "run"
    for step in (3, 6):
        write_checkpoint(folder, step)
    write_checkpoint(folder, 9, finished=True)
    state = checkpoint.finished_state(folder, SETTINGS.train)
    assert state is not None
    run = TrainResult("the key", "the run", folder, state, "http://us:secret@store")
    metrics = write_model(run, SETTINGS, root, tmp_path / "final")
    model = checkpoint.load_model(tmp_path / "final")
    expected = checkpoint.average(folder, SETTINGS.train.average_checkpoints, pytest.fail)[0]
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "final" / "run.json").read_text()) == {
        "run_key": "the key", "mlflow_run_id": "the run", "tracking_uri": "http://store", "step": 9,
    }  # fmt: skip
    assert (tmp_path / "final" / "spm.model").read_bytes() == b"pieces"
    verify(tmp_path / "final", ["weights.safetensors", "config.json", "run.json", "spm.model"], "train")
    assert metrics.pop("parameters") == sum(p.numel() for p in model.parameters())
    assert metrics == {
        "steps": 9, "epochs": 0, "tokens": 700, "train_seconds": 2.0, "tokens_per_second": 350.0, "train_loss": 2.5,
        "valid_loss": 1.5, "valid_ppl": 4.5, "valid_ppl_word": 9.5, "best_valid_ppl": 4.5, "best_valid_step": 9,
        "averaged_steps": [9, 6],
    }  # fmt: skip


def test_write_model_logs_that_the_best_validation_was_long_before_the_end(root, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "grammar-mini-1-0123456789ab-9", 9, finished=True).parent
    state = checkpoint.finished_state(folder, SETTINGS.train)
    assert state is not None
    state.validation_curve.insert(0, {"step": 4, "valid_loss": 1.2, "valid_ppl": 3.3, "valid_ppl_word": 7.0})
    metrics = write_model(TrainResult("", "", folder, state, ""), SETTINGS, root, tmp_path / "final")
    assert (metrics["best_valid_ppl"], metrics["best_valid_step"], metrics["valid_ppl"]) == (3.3, 4, 4.5)
    assert "the best validation loss was at step 4 of 9 (perplexity 3.30 there, 4.50" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "average", "logs"),
    [
        ((3, 6, 9), 2, False),
        ((3, 6, 9), 5, False),  # only three were ever written
        ((6, 9), 3, True),
        ((6, 9, 10), 3, False),
        ((9, 10), 3, True),
    ],
)
def test_write_model_logs_that_fewer_checkpoints_are_averaged_and_why(root, tmp_path, capsys, steps, average, logs):
    folder = tmp_path / f"grammar-mini-1-0123456789ab-{steps[-1]}"
    for step in steps:
        write_checkpoint(folder, step, finished=step == steps[-1])
    run = TrainResult("the key", "the run", folder, checkpoint.load_state(folder / f"step_{steps[-1]:08d}"), "")
    metrics = write_model(run, settings(train={"average_checkpoints": average}), root, tmp_path / "final")
    assert metrics["averaged_steps"] == list(reversed(steps))[:average]
    line = (
        f"train: averaged {len(steps)} checkpoints instead of {average} (train.average_checkpoints): a lower "
        "train.keep_checkpoints or a sweep had kept fewer, or some are damaged; to average all, "
        f"delete {tmp_path}/*-0123456789ab-* and train again\n"
    )
    assert capsys.readouterr().err == (line if logs else "")


def test_write_model_averages_a_finished_run_again_if_average_checkpoints_changes(root, tmp_path):
    folder = tmp_path / run_folder(SETTINGS, root, run_key(SETTINGS, root)).name
    for step in (3, 6, 9):
        write_checkpoint(folder, step, finished=step == 9)
    for average in (1, 3):
        changed = settings(train={"average_checkpoints": average})
        assert run_key(changed, root) == run_key(SETTINGS, root)
        state = checkpoint.finished_state(folder, changed.train)
        assert state is not None
        metrics = write_model(TrainResult("", "", folder, state, ""), changed, root, tmp_path / "final")
        assert metrics["averaged_steps"] == [9, 6, 3][:average]
