"""The trials of a sweep: every row with every seed, with its settings, keys and record."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.common.atomic_io import write_json
from pipeline.common.code_digest import code_digest
from pipeline.common.paths import CLEAN
from pipeline.common.settings import Settings, load_settings
from pipeline.common.storage import AnyPath, as_os_error
from pipeline.tracking.results import search_name
from pipeline.training.run import run_folder, run_key
from sweeps import table3
from sweeps.table3 import Row

EVALUATION_CODE = (
    "model/decoding.py",
    "model/kv_cache.py",
    "pipeline/common/languages.py",
    "pipeline/inference/ctranslate2_engine.py",
    "pipeline/inference/ctranslate2_export.py",
    "pipeline/inference/evaluation.py",
    "pipeline/inference/metrics.py",
    "pipeline/inference/split.py",
    "pipeline/inference/torch_engine.py",
    "pipeline/inference/trained_model.py",
    "pipeline/inference/translate.py",
    "pipeline/training/checkpoint.py",
)
"""The files that decide the scores of a training run, besides settings and texts: all that evaluation.py imports,
directly or not, except WEIGHTS_CODE, which the run's key covers, and the files that tests/sweeps/test_trials.py lists
with reasons.
"""


@dataclass(frozen=True)
class Trial:
    """One row with one seed: a training run and its evaluation, whose `record` is in the run's folder.

    `key` is a digest of everything that decides the result; a record with another key is ignored. `run_key`
    identifies the trial's run in MLflow. It covers training and search, because one trained model that is evaluated
    with two beam sizes has two results.
    """

    row: Row
    seed: int
    settings: Settings
    folder: AnyPath
    key: str
    run_key: str

    @property
    def id(self) -> str:
        return f"{self.row.id}.{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.row.label}, seed {self.seed}"

    def write_record(self, record: Mapping[str, Any]) -> None:
        write_json(self.folder / "trial.json", {"key": self.key, **record})

    def record(self) -> dict[str, Any] | None:
        """The result of the trial, {"status", "error", "metrics", ...}, or None if there is none yet."""
        path = self.folder / "trial.json"
        try:
            with as_os_error(path):
                record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get("key") == self.key else None


@dataclass(frozen=True)
class SweepPlan:
    """All rows of a sweep, including skipped ones (with the reason in `skipped`), and the trials of the others.

    `run_key` identifies the sweep's run in MLflow. It depends only on data, code, base and search, so that rows and
    seeds can be added to a sweep.
    """

    base: Settings
    rows: list[Row]
    trials: list[Trial]
    run_key: str


def load_sweep(root: Path, settings: Settings | None = None) -> SweepPlan:
    """The sweep of `settings`, by default those of params.yaml. Raises ValueError that names the setting."""
    settings = settings or load_settings(root)
    sweep = settings.sweep
    base = replace(
        settings,
        tracking=replace(settings.tracking, experiment=f"table3-{settings.data_name}-{settings.model_name}"),
        hardware=replace(
            settings.hardware, cpus_per_worker=sweep.cpus_per_worker or settings.hardware.cpus_per_worker
        ),
    )
    rows = table3.rows(base, sweep.rows, sweep.grid or {})
    kept: list[Row] = []
    trials: list[Trial] = []
    labels: dict[AnyPath, str] = {}
    for row in rows:
        trials_of_row = [] if row.skipped else [_trial(base, row, seed, root) for seed in sweep.seeds]
        if trials_of_row and (same := labels.get(trials_of_row[0].folder)):  # both would train in one folder
            row, trials_of_row = replace(row, skipped=f"trains the same weights as {same}"), []
        labels |= {trial.folder: row.label for trial in trials_of_row}
        kept.append(row)
        trials += trials_of_row
    key = _search_key(base, run_key(base.with_seed(0), root))
    return SweepPlan(base, kept, trials, f"sweep {key}")


def _trial(base: Settings, row: Row, seed: int, root: Path) -> Trial:
    workers = base.sweep.num_workers or {}
    named = [workers[name] for name in (row.axis, row.group) if name in workers]
    num_workers = named[0] if named else base.hardware.num_workers
    settings = table3.apply(base, row).with_seed(seed)
    settings = replace(settings, hardware=replace(settings.hardware, num_workers=num_workers))
    key = run_key(settings, root)
    folder = run_folder(settings, root, key)
    return Trial(row, seed, settings, folder, _result_key(settings, root, key), _search_key(settings, key))


def _search_key(settings: Settings, key: str) -> str:
    return f"{key}, {search_name(settings)}"


def _result_key(settings: Settings, root: Path, key: str) -> str:
    e = settings.evaluate
    decisive = [key, settings.train.average_checkpoints, e.beam, e.alpha, e.max_extra, e.engine]
    digest = hashlib.sha256(json.dumps(decisive).encode())
    languages = settings.data.src, settings.data.tgt
    texts = [CLEAN / f"{split}.{language}" for split in ("test", "valid") for language in languages]
    digest.update(code_digest(root, EVALUATION_CODE).encode())
    for path in texts:
        try:
            digest.update((root / path).read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: run the tokenize stage first (dvc repro tokenize)") from None
    return digest.hexdigest()[:12]
