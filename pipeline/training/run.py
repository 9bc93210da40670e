"""A run's identity and results: its key, its folder, the averaged model."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import replace_folder, write_json
from pipeline.common.paths import CHECKPOINTS, ENCODED
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, run_storage
from pipeline.data.dataset import CorpusInfo
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState

CODE = (
    "model/*.py",
    "pipeline/data/batching.py",
    "pipeline/data/dataset.py",
    "pipeline/training/loop.py",
    "pipeline/training/trainer.py",
)
"""What decides the weights beside settings and data."""


@dataclass(frozen=True)
class TrainResult:
    """A run that has come to its last step."""

    key: str
    run_id: str
    run_folder: AnyPath
    state: TrainState
    tracking_uri: str


def finished_state(folder: AnyPath) -> TrainState | None:
    """Where training stands if it has come to its end."""
    if not checkpoint.seems_finished(folder):
        return None
    last = checkpoint.load_latest(folder, _say)
    return last.state if last and last.state.finished else None


def run_folder(settings: Settings, root: Path) -> AnyPath:
    """Where the checkpoints of this run are."""
    name = f"{settings.data_name}-{settings.model_name}-{settings.seed}-{run_key(settings, root)}"
    return run_storage(root) / CHECKPOINTS.name / name


def run_key(settings: Settings, root: Path) -> str:
    """A digest of all that decides the weights of a run: not how many workers there are, nor where."""
    decisive = {
        "data": CorpusInfo.open(root / ENCODED).sha256,
        "seed": settings.seed,
        "model": asdict(settings.model),
        "train": asdict(settings.train),
        "micro_batch_tokens": settings.hardware.micro_batch_tokens,
        "precision": settings.hardware.precision,
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _say_how_it_starts(folder: AnyPath) -> None:
    if checkpoint.folders(folder):
        _say(f"settings, data and code are those of {folder.name}")
    elif isinstance(folder, Path) and (
        others := [path for path in folder.parent.glob("*") if path != folder and checkpoint.folders(path)]
    ):
        last = max(others, key=lambda path: path.stat().st_mtime)
        _say(f"settings, data or code differ from those of {last.name}, the last run: training starts anew")


def write_model(run: TrainResult, settings: Settings, root: Path, target: AnyPath) -> dict[str, Any]:
    """Write the final model, the average of the last checkpoints, to the folder `target`; the run's metrics."""
    weights, steps = checkpoint.average(run.run_folder, settings.train.average_checkpoints, _say)
    config = settings.model.config(CorpusInfo.open(root / ENCODED).vocab_size)
    state = run.state
    with replace_folder(target) as folder:
        checkpoint.save_model(folder, weights, config)
        write_json(
            folder / "run.json",
            {
                "run_key": run.key,
                "mlflow_run_id": run.run_id,
                "tracking_uri": run.tracking_uri,
                "step": state.step,
            },
        )
    last = state.validation_curve[-1]
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
        "parameters": sum(value.numel() for value in weights.values()),
        "averaged_steps": steps,
    }


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr, flush=True)
