"""Train the Transformer with Ray Train, on one worker or many, on CPUs or GPUs.

    python -m pipeline.train
    RAY_ADDRESS=head:6379 RUN_STORAGE=s3://bucket/runs python -m pipeline.train

Reads data/encoded/, data/tokenizer/ and data/clean/ (to score translations
during training). Writes

- models/final, the average of the last checkpoints,
- reports/train.json and metrics/train.json,
- reports/training_curve and reports/validation_curve (.csv, .png),
- checkpoints/, or <RUN_STORAGE>/checkpoints/,
- the settings and curves to MLflow (MLFLOW_TRACKING_URI, else mlflow.db).

With RAY_ADDRESS set, or in a job of `ray job submit`, it trains on that
cluster; otherwise it trains on this machine.

A run is identified by the settings, data and code that decide its weights. If
any of these changes, a new run starts. If a run was killed, the same command
resumes it from its last checkpoint. With a larger train.max_steps or
train.patience, training continues from the end of the shorter run, whose
checkpoints are kept.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.cluster.preflight import preflight
from pipeline.cluster.ray_cluster import needs_no_workers, ray_cluster
from pipeline.cluster.training_run import TrainingError, training_run
from pipeline.common import cli
from pipeline.common.atomic_io import write_csv, write_json
from pipeline.common.chart import write_chart
from pipeline.common.paths import ENCODED, FINAL, METRICS, REPORTS
from pipeline.common.settings import Settings, load_settings
from pipeline.data.workspace import open_workspace
from pipeline.training.advice import size_advice
from pipeline.training.checkpoint import finished_state
from pipeline.training.run import log, log_how_it_starts, run_folder, run_key, write_model
from pipeline.training.siblings import continue_sibling

CHARTS = {
    "training": {"train_loss": "Training loss (label-smoothed, nats per token)"},
    "validation": {"valid_ppl": "Validation perplexity (per token)", "valid_bleu": "BLEU of a validation sample"},
}
SHOWN_CURVES = ("train_loss", "valid_ppl", "valid_bleu")
"""The curves shown in the MLflow view of single runs."""


def train(settings: Settings, root: Path = Path()) -> dict[str, Any]:
    """Train, average the last checkpoints into models/final and write the reports; return the metrics.

    Raises ValueError or OSError with a one-line message for what a user can fix, TrainingError if training failed.
    """
    started = time.perf_counter()
    workspace = open_workspace(settings, root)
    root = workspace.root
    key = run_key(settings, root)
    folder = run_folder(settings, root, key)
    log_how_it_starts(folder, continue_sibling(folder, settings.train, log))
    finished = finished_state(folder, settings.train)
    for line in () if finished else size_advice(root / ENCODED, settings.model):
        log(line)
    in_process = needs_no_workers(settings.hardware)
    cluster = nullcontext() if finished or in_process else ray_cluster(settings.hardware, root)
    with _store_opening(workspace.tracking_uri) as store_opened, cluster:
        if not finished:
            preflight(settings.hardware, workspace)
        store_opened.result()
        from pipeline.tracking.notes import SCORES
        from pipeline.tracking.runs import reconcile
        from pipeline.tracking.views import share_runs_view

        reconcile(workspace.tracking_uri, settings.tracking.experiment)
        with training_run(settings, workspace, key, folder, finished, in_process=in_process) as run:
            metrics = write_model(run, settings, root, root / FINAL)
            write_json(root / REPORTS / "train.json", metrics)
            shown = {"steps": metrics["steps"], "tokens_per_s": round(metrics["tokens_per_second"])}
            write_json(root / METRICS / "train.json", shown | {"valid_ppl": round(metrics["valid_ppl"], 3)})
            for name in ("training", "validation"):
                curve = getattr(run.state, f"{name}_curve")
                write_csv(root / REPORTS / f"{name}_curve.csv", curve)
                image = root / REPORTS / f"{name}_curve.png"
                write_chart(image, curve, ("step", "steps"), CHARTS[name], points=name == "validation")
            if address := share_runs_view(workspace.tracking_uri, run.run_id, SHOWN_CURVES, tuple(SCORES)):
                log(f"in MLflow (make ui): {address}")
    log(end_line(time.perf_counter() - started, metrics["steps"], trained_before=finished is not None))
    return metrics


def end_line(seconds: float, step: int, *, trained_before: bool) -> str:
    """The last line that the stage prints. `step` is the last step of training; `trained_before`: an earlier command
    did the training."""
    if trained_before:
        return f"done in {seconds:.0f} s, without training: {FINAL}/weights.safetensors is from step {step}"
    return f"done in {seconds:.0f} s: trained to step {step}, {FINAL}/weights.safetensors"


@contextmanager
def _store_opening(uri: str) -> Iterator[Future[None]]:
    """Import MLflow and open its store, which takes seconds, in a thread while Ray starts."""

    def open_store() -> None:
        from pipeline.tracking.store import prepare_store

        prepare_store(uri)

    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(open_store)


def main() -> None:
    cli.parser("pipeline.train", __doc__).parse_args()
    interrupted = "interrupted; the same command resumes from the last checkpoint"
    with cli.exit_on_error("train", TrainingError, interrupted=interrupted):
        train(load_settings())


if __name__ == "__main__":
    main()
