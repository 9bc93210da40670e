"""A run's identity and results: its key, its folder, the averaged model."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import replace_folder, write_json
from pipeline.common.checksums import copy_with_sums, write_sums
from pipeline.common.code_digest import code_digest
from pipeline.common.environment import without_passwords
from pipeline.common.paths import CHECKPOINTS, ENCODED, TOKENIZER
from pipeline.common.settings import Settings, Train
from pipeline.common.storage import AnyPath, run_storage
from pipeline.data.dataset import TOKENIZER_FILE, CorpusInfo
from pipeline.training import checkpoint
from pipeline.training.advice import best_validation, overfitting_advice
from pipeline.training.loop import TrainState
from pipeline.training.siblings import Origin, all_of_trajectory

WEIGHTS_CODE = (
    "model/config.py",
    "model/cpu/attention.py",
    "model/cpu/dropout.py",
    "model/cpu/library.py",
    "model/cpu/matmul.py",
    "model/loss.py",
    "model/perplexity.py",  # train.patience ends training by the validation loss
    "model/schedule.py",
    "model/transformer.py",
    "pipeline/data/batching.py",
    "pipeline/data/bucketing.py",
    "pipeline/data/dataset.py",
    "pipeline/training/loop.py",
    "pipeline/training/threads.py",
    "pipeline/training/trainer.py",
)
"""The code that determines the weights, besides settings and data: trainer.py and its direct and indirect imports.

tests/pipeline/training/test_run.py lists the imports that are left out, with the reasons."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run, and its id and store in MLflow."""

    key: str
    run_id: str
    run_folder: AnyPath
    state: TrainState
    tracking_uri: str


def run_folder(settings: Settings, root: Path, key: str) -> AnyPath:
    """The folder with the checkpoints of the run with this `run_key`."""
    name = f"{settings.data_name}-{settings.model_name}-{settings.seed}-{key}"
    return run_storage(root) / CHECKPOINTS.name / name


NO_TRAJECTORY = ("max_steps", "patience", "log_every", "bleu_sentences", "keep_checkpoints", "average_checkpoints")
"""The settings of `train` that do not change the steps, but only the end, what is logged, and what is kept."""


def run_key(settings: Settings, root: Path) -> str:
    """The identity of a run: its trajectory and its end, as "<trajectory>-<max_steps>" or, if patience may end it
    sooner, "<trajectory>-<max_steps>-p<patience>".

    The trajectory is a digest of everything that determines a step: data, settings and code. It does not depend on
    the number of workers, which only changes the order of sums, nor on comments, docstrings and formatting.
    """
    train = settings.train
    patience = f"-p{train.patience}" if train.patience else ""
    return f"{_trajectory(settings, root)}-{train.max_steps}{patience}"


def _trajectory(settings: Settings, root: Path) -> str:
    decisive = {
        "data": CorpusInfo.open(root / ENCODED).sha256,
        "model": asdict(settings.model),
        "train": {key: value for key, value in asdict(settings.train).items() if key not in NO_TRAJECTORY},
        "micro_batch_tokens": settings.hardware.micro_batch_tokens,
        "precision": settings.hardware.precision,
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    digest.update(code_digest(root, WEIGHTS_CODE).encode())
    return digest.hexdigest()[:12]


def log_how_it_starts(folder: AnyPath, origin: Origin | None) -> None:
    """Log whether training resumes in this run folder, continues a sibling whose checkpoints `continue_sibling` has
    copied there, or is a new run because settings, data or code changed."""
    if origin:
        log(f"{folder.name} continues from {origin.description}: the runs differ only in where they end")
    elif checkpoint.folders(folder):
        log(f"settings, data and code are the same as in {folder.name}")
    elif isinstance(folder, Path) and (
        others := [path for path in folder.parent.glob("*") if path != folder and checkpoint.folders(path)]
    ):
        last = max(others, key=lambda path: path.stat().st_mtime)
        log(f"a new run: settings, data or code differ from the last run, {last.name}")


def write_model(run: TrainResult, settings: Settings, root: Path, target: AnyPath) -> dict[str, Any]:
    """Write the final model to the folder `target`: the average of the last checkpoints, tokenizer and checksums.

    Returns the run's metrics.
    """
    weights, steps = checkpoint.average(run.run_folder, settings.train.average_checkpoints, log)
    config = settings.model.config(CorpusInfo.open(root / ENCODED).vocab_size)
    state = run.state
    _log_fewer_averaged(len(steps), state.step, settings.train, run.run_folder)
    with replace_folder(target) as folder:
        checkpoint.save_model(folder, weights, config)
        write_json(
            folder / "run.json",
            {
                "run_key": run.key,
                "mlflow_run_id": run.run_id,
                "tracking_uri": without_passwords(run.tracking_uri),
                "step": state.step,
            },
        )
        write_sums(folder, ["run.json"])
        copy_with_sums(root / TOKENIZER, folder, [TOKENIZER_FILE], "tokenize")
    last, best = state.validation_curve[-1], best_validation(state.validation_curve)
    if advice := overfitting_advice(state.validation_curve):
        log(advice)
    return {
        "steps": state.step,
        "epochs": state.position.epoch,
        "tokens": state.tokens,
        "train_seconds": round(state.seconds, 1),
        "tokens_per_second": round(state.tokens / state.seconds, 1),
        "train_loss": state.training_curve[-1]["train_loss"],
        "valid_loss": last["valid_loss"],
        "valid_ppl": last["valid_ppl"],
        "valid_ppl_word": last["valid_ppl_word"],
        "best_valid_ppl": best["valid_ppl"],
        "best_valid_step": int(best["step"]),
        "parameters": sum(value.numel() for value in weights.values()),
        "averaged_steps": steps,
    }


def _log_fewer_averaged(number: int, last: int, settings: Train, folder: AnyPath) -> None:
    """Log that only `number` checkpoints were averaged, and why, if a run to step `last` writes more."""
    written = last // settings.checkpoint_every + bool(last % settings.checkpoint_every)
    if number < min(settings.average_checkpoints, written):
        log(
            f"averaged {number} checkpoints instead of {settings.average_checkpoints} (train.average_checkpoints): "
            "a lower train.keep_checkpoints or a sweep had kept fewer, or some are damaged; to average all, "
            f"delete {all_of_trajectory(folder)} and train again"
        )


def log(line: str) -> None:
    """Print a line for the user to stderr."""
    print(without_passwords(f"train: {line}"), file=sys.stderr, flush=True)
