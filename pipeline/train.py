"""Stage: train the Transformer with Ray Train, on one worker or many, on CPUs or GPUs.

    python -m pipeline.train

With RAY_ADDRESS set, or inside `ray job submit`, it uses that cluster; otherwise it starts Ray on this machine.
A run is named after all that decides its weights: settings, data and code. Killed and started again, it continues
from its last checkpoint in checkpoints/; with other settings, data or code it starts anew.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from pipeline import checkpoint, progress
from pipeline.cluster import check, is_private, nodes, ray_cluster, share_of_each_worker, versions
from pipeline.corpus import ENCODED, CorpusInfo
from pipeline.files import replace_folder, write_json, write_text
from pipeline.loop import State
from pipeline.params import Hardware, Settings, load_settings
from pipeline.publish import bring
from pipeline.ray_worker import Job, LeanTrainer, ReachableTorch, last_line, settings_file, work
from pipeline.storage import PATIENCE_S, Folder, run_storage, tracking_uri
from pipeline.usage import usage

CHECKPOINTS, FINAL, REPORTS = Path("checkpoints"), Path("models/final"), Path("reports")
CODE = ("model/*.py", "pipeline/batching.py", "pipeline/corpus.py", "pipeline/loop.py", "pipeline/worker.py")
"""What decides the weights beside settings and data."""


class TrainingError(RuntimeError):
    """Training did not come to its end; says why, and what to do."""


@dataclass(frozen=True)
class Trained:
    """A run that has come to its last step."""

    key: str
    run_id: str
    run_folder: Folder
    state: State
    tracking_uri: str


def train(settings: Settings, root: Path = Path()) -> dict[str, Any]:
    """The stage: train, average the last checkpoints into models/final, write the reports; returns the metrics.

    Raises ValueError or OSError with one line for what a user can mend, TrainingError if training failed.
    """
    started = time.perf_counter()
    root = root.resolve()
    store_opened = ThreadPoolExecutor(1).submit(_open_store, tracking_uri(root))  # while Ray starts
    published = bring(settings, root, run_storage(root))
    folder = run_folder(settings, root)
    _say_how_it_starts(folder)
    done = _finished(folder) is not None
    with nullcontext() if done else ray_cluster(settings.hardware, root):
        if not done:
            check(settings.hardware, root, run_storage(root), published, tracking_uri(root))
        store_opened.result()
        from pipeline import tracking

        tracking.reconcile(tracking_uri(root), settings.tracking.experiment)
        with training(settings, root, published) as run:
            metrics = write_model(run, settings, root, root / FINAL)
            write_json(root / REPORTS / "train.json", metrics)
            for name in ("training", "validation"):
                write_text(root / REPORTS / f"{name}_curve.csv", _csv(getattr(run.state, f"{name}_curve")))
    _say(f"done in {time.perf_counter() - started:.0f} s: {metrics['steps']} steps, {FINAL}/weights.safetensors")
    return metrics


def _open_store(uri: str) -> None:
    from pipeline import tracking  # MLflow takes seconds to import

    tracking.prepare(uri)


@contextmanager
def training(
    settings: Settings,
    root: Path,
    published: Folder | None,
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    show: bool = True,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> Iterator[Trained]:
    """Train to the end on the Ray cluster at hand, then run the block; the MLflow run is open until the block ends.

    `published` is where other machines find the data, None if there are none. `tags` go to the MLflow run, which is
    found again by `key` (default: `run_key`); `show` draws a progress bar. With `callbacks`, Ray gets the metrics of
    every validation. Training that is finished needs no cluster. Raises as `train`.
    """
    from pipeline import tracking

    key, folder = key or run_key(settings, root), run_folder(settings, root)
    uri = tracking_uri(root)
    state = _finished(folder)
    if state and show:
        _say(f"trained already, to step {state.step}; to train again, delete {folder}")
    gpu, cpus = (False, 0) if state else share_of_each_worker(settings.hardware)
    makeup = {} if state else _makeup(settings.hardware, gpu, cpus)
    last_sign_at = None if state else usage(folder).last_sign_at
    run_id = tracking.open_run(uri, settings, key, makeup | dict(tags or {}), root, last_sign_at)
    with tracking.run_guard(uri, run_id):
        if state is None:
            job = Job(
                settings, root / ENCODED, published, folder, uri, run_id, cpus, gpu, reports_to_ray=bool(callbacks)
            )
            state = _fit(job, show, list(callbacks))
        _complete_curves(uri, run_id, state)
        yield Trained(key, run_id, folder, state, uri)
    tracking.finish(uri, run_id)


def _makeup(hardware: Hardware, gpu: bool, cpus: int) -> dict[str, str]:
    """The cluster's, as tags."""
    least, most = hardware.min_workers, hardware.max_workers
    return {
        "workers": str(most) if least == most else f"{least} to {most}",
        "device": "gpu" if gpu else "cpu",
        "cpus_per_worker": str(cpus),
        "nodes": str(len(nodes())),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _finished(folder: Folder) -> State | None:
    """Where training stands if it has come to its end."""
    if not checkpoint.seems_finished(folder):
        return None
    last = checkpoint.load_latest(folder, _say)
    return last.state if last and last.state.finished else None


def run_folder(settings: Settings, root: Path) -> Folder:
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


def _say_how_it_starts(folder: Folder) -> None:
    if checkpoint.folders(folder):
        _say(f"settings, data and code are those of {folder.name}")
    elif isinstance(folder, Path) and (
        others := [path for path in folder.parent.glob("*") if path != folder and checkpoint.folders(path)]
    ):
        last = max(others, key=lambda path: path.stat().st_mtime)
        _say(f"settings, data or code differ from those of {last.name}, the last run: training starts anew")


def _fit(job: Job, show: bool, callbacks: list[ray.train.UserCallback]) -> State:
    """Run the workers until training is done, starting dead ones again; the state of the last checkpoint."""
    hardware = job.settings.hardware
    resources = {"CPU": job.cpus} | ({"GPU": 1} if job.gpu else {})
    elastic = hardware.min_workers < hardware.max_workers
    if elastic:  # seconds for which Ray waits for all that were there, before it takes those that are: from 60
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    num_workers = (hardware.min_workers, hardware.max_workers) if elastic else hardware.max_workers
    shown = progress.shown(job.progress_file, job.settings.train.max_steps, "train") if show else nullcontext()
    write_json(settings_file(job.run_folder), asdict(job.settings))
    try:
        with shown, tempfile.TemporaryDirectory() as rays_own:
            result = LeanTrainer(
                work,
                train_loop_config={"job": job},
                private=is_private(),
                torch_config=ReachableTorch(),
                scaling_config=ScalingConfig(
                    num_workers=num_workers,  # type: ignore[arg-type]  # mypy sees Ray Train v1 here and below
                    use_gpu=job.gpu,
                    resources_per_worker=resources,
                ),
                run_config=RunConfig(
                    name=job.run_folder.name,
                    storage_path=rays_own,  # Ray gets no checkpoint: ours lie in job.run_folder
                    failure_config=FailureConfig(max_failures=hardware.max_failures),
                    callbacks=callbacks,  # type: ignore[arg-type]
                    logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
                ),
            ).fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training failed: {last_line(error)}; run again to go on from the last checkpoint"
        ) from error
    if stopped_by := result.return_value:  # type: ignore[attr-defined]
        raise TrainingError(stopped_by)
    last = checkpoint.load_latest(job.run_folder, _say)
    if last is None or not last.state.finished:
        raise TrainingError(f"training ended, but its last checkpoint is not in {job.run_folder}")
    return last.state


def _complete_curves(uri: str, run_id: str, state: State) -> None:
    """Points that a worker had to leave behind; and all, if this MLflow run is new to training that was done."""
    from pipeline.tracking import MetricWriter

    writer = MetricWriter(uri, run_id)
    for point in sorted([*state.training_curve, *state.validation_curve], key=lambda point: point["step"]):
        writer.log({key: value for key, value in point.items() if key != "step"}, int(point["step"]))
    writer.close(PATIENCE_S)


def write_model(run: Trained, settings: Settings, root: Path, target: Folder) -> dict[str, Any]:
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
        "epochs": state.position[0],
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


def _csv(rows: list[dict[str, float]]) -> str:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr, flush=True)


def end_with_dvc() -> None:
    """Under DVC, end when it does. `kill -9` of `dvc repro` would otherwise leave training running unseen, in the
    way of the next `dvc repro`. Started by hand (nohup, say), training outlives its parent."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if "DVC_STAGE" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    end_with_dvc()
    try:
        train(load_settings())
    except (ValueError, OSError, TrainingError) as error:
        _say(str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the last checkpoint")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
