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
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from pipeline import checkpoint, progress, tracking
from pipeline.corpus import CorpusInfo
from pipeline.files import replace_folder, write_json, write_text
from pipeline.loop import NotFiniteError, State
from pipeline.params import Hardware, Settings, load_settings
from pipeline.usage import Meter
from pipeline.worker import rate_of_step, train_rank

ENCODED, CHECKPOINTS, FINAL, REPORTS = (
    Path("data/encoded"),
    Path("checkpoints"),
    Path("models/final"),
    Path("reports"),
)
CODE = ("model/*.py", "pipeline/batching.py", "pipeline/corpus.py", "pipeline/loop.py", "pipeline/worker.py")
"""What decides the weights beside settings and data."""


OBJECT_STORE_BYTES = 200_000_000
"""Of Ray on this machine: nothing large passes through it."""


class TrainingError(RuntimeError):
    """Training did not come to its end; says why, and what to do."""


@dataclass(frozen=True)
class Job:
    """What the driver sends to every worker. All paths are absolute: a worker runs in a folder of its own."""

    settings: Settings
    data: Path
    run_folder: Path
    tracking_uri: str
    run_id: str
    cpus: int
    gpu: bool
    reports_to_ray: bool

    @property
    def progress_file(self) -> Path:
        return self.run_folder / "progress.json"


@dataclass(frozen=True)
class Trained:
    """A run that has come to its last step."""

    key: str
    run_id: str
    run_folder: Path
    state: State
    tracking_uri: str


def train(settings: Settings, root: Path = Path()) -> dict[str, Any]:
    """The stage: train, average the last checkpoints into models/final, write the reports; returns the metrics.

    Raises ValueError or OSError with one line for what a user can mend, TrainingError if training failed.
    """
    started = time.perf_counter()
    root = root.resolve()
    _say_how_it_starts(run_folder(settings, root))
    tracking.reconcile(tracking.tracking_uri(root), settings.tracking.experiment)
    with ray_cluster(settings.hardware), training(settings, root) as run:
        metrics = write_model(run, settings, root, root / FINAL)
        write_json(root / REPORTS / "train.json", metrics)
        for name in ("training", "validation"):
            write_text(root / REPORTS / f"{name}_curve.csv", _csv(getattr(run.state, f"{name}_curve")))
    _say(f"done in {time.perf_counter() - started:.0f} s: {metrics['steps']} steps, {FINAL}/weights.safetensors")
    return metrics


@contextmanager
def training(
    settings: Settings,
    root: Path,
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    show: bool = True,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> Iterator[Trained]:
    """Train to the end on the Ray cluster at hand, then run the block; the MLflow run is open until the block ends.

    `tags` go to that run, which is found again by `key` (default: `run_key`); `show` draws a progress bar. With
    `callbacks`, Ray gets the metrics of every validation. Raises as `train`.
    """
    key, folder = key or run_key(settings, root), run_folder(settings, root)
    uri = tracking.tracking_uri(root)
    gpu, cpus = share_of_each_worker(settings.hardware)
    all_tags = {
        "workers": str(settings.hardware.num_workers),
        "device": "gpu" if gpu else "cpu",
        "cpus_per_worker": str(cpus),
        "nodes": str(sum(node["Alive"] for node in ray.nodes())),
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}",
        **(tags or {}),
    }
    run_id = tracking.open_run(uri, settings, key, all_tags, root)
    with tracking.run_guard(uri, run_id):
        job = Job(settings, root / ENCODED, folder, uri, run_id, cpus, gpu, reports_to_ray=bool(callbacks))
        state = _fit(job, show, list(callbacks))
        _complete_curves(uri, run_id, folder, state)
        yield Trained(key, run_id, folder, state, uri)
    tracking.finish(uri, run_id)


def run_folder(settings: Settings, root: Path) -> Path:
    """Where the checkpoints of this run are."""
    name = f"{settings.data_name}-{settings.model_name}-{settings.seed}-{run_key(settings, root)}"
    return root.resolve() / CHECKPOINTS / name


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


def _say_how_it_starts(folder: Path) -> None:
    others = [path for path in folder.parent.glob("*") if path != folder and checkpoint.folders(path)]
    if checkpoint.folders(folder):
        _say(f"settings, data and code are those of {folder.name}")
    elif others:
        last = max(others, key=lambda path: path.stat().st_mtime)
        _say(f"settings, data or code differ from those of {last.name}, the last run: training starts anew")


@contextmanager
def ray_cluster(hardware: Hardware, dashboard: bool = False) -> Iterator[None]:
    """The cluster of RAY_ADDRESS or of this job, else Ray on this machine for as long as the block takes; with
    `dashboard`, which takes memory, but which Ray needs to clean up after trials that a scheduler ends."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that watches cloud nodes
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # from 2 s: the end of training waits for it
    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = max(len(os.sched_getaffinity(0)), hardware.num_workers)
        options = {
            "address": "local",  # never the cluster that somebody started with `ray start` on this machine
            "num_cpus": cpus,
            "include_dashboard": dashboard,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        # One of Ray's helpers asks the dashboard once a second. Without one, it warns each time that it got none,
        # and dies with a traceback when it finds two clusters on this machine: tell it where nobody answers.
        if not dashboard:
            os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"
    ray.init(logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **options)
    try:
        yield
    finally:
        ray.shutdown()


def share_of_each_worker(hardware: Hardware) -> tuple[bool, int]:
    """Whether each worker gets a GPU, and its number of CPUs. Raises ValueError if there are not enough."""
    cluster = ray.cluster_resources()
    num_cpus, num_gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    gpu = hardware.device == "gpu" or (hardware.device == "auto" and num_gpus >= hardware.num_workers)
    if gpu and num_gpus < hardware.num_workers:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with a GPU each: the cluster has {num_gpus}; "
            "lower it, or set hardware.device to cpu"
        )
    cpus = hardware.cpus_per_worker or num_cpus // hardware.num_workers
    if cpus < 1 or cpus * hardware.num_workers > num_cpus:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with {max(cpus, 1)} CPUs each: the cluster has "
            f"{num_cpus}; lower it, or hardware.cpus_per_worker"
        )
    return gpu, cpus


def _fit(job: Job, show: bool, callbacks: list[ray.train.UserCallback]) -> State:
    """Run the workers until training is done, starting dead ones again; the state of the last checkpoint."""
    last = checkpoint.load_latest(job.run_folder, _say)
    if last is not None and last.state.finished:
        if show:
            _say(f"trained already, to step {last.state.step}; to train again, delete {job.run_folder}")
        return last.state
    hardware = job.settings.hardware
    resources = {"CPU": job.cpus} | ({"GPU": 1} if job.gpu else {})
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # mypy sees the classes of Ray Train v1 here and below
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=hardware.num_workers, use_gpu=job.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=job.run_folder.name,
            storage_path=str(job.run_folder.parent),
            failure_config=FailureConfig(max_failures=hardware.max_failures),
            callbacks=callbacks,  # type: ignore[arg-type]
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )
    shown = progress.shown(job.progress_file, job.settings.train.max_steps, "train") if show else nullcontext()
    try:
        with shown:
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training failed: {_last_line(error)}; run again to go on from the last checkpoint"
        ) from error
    if stopped_by := result.return_value:  # type: ignore[attr-defined]
        raise TrainingError(stopped_by)
    last = checkpoint.load_latest(job.run_folder, _say)
    if last is None or not last.state.finished:
        raise TrainingError(f"training ended, but its last checkpoint is not in {job.run_folder}")
    return last.state


def _complete_curves(uri: str, run_id: str, folder: Path, state: State) -> None:
    """Points that a worker had to leave behind; and all, if this MLflow run is new to training that was done."""
    writer = tracking.MetricWriter(uri, run_id, folder)
    for point in sorted([*state.training_curve, *state.validation_curve], key=lambda point: point["step"]):
        writer.log({key: value for key, value in point.items() if key != "step"}, int(point["step"]))
    writer.close()


def work(config: dict[str, Any]) -> str | None:
    """One worker: the loop, with Ray's ranks, a progress bar, and curves to MLflow from rank 0. Returns what
    stopped it if every further attempt would stop there too; other errors are Ray's, which starts again."""
    job: Job = config["job"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(job.cpus)
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    writer = tracking.MetricWriter(job.tracking_uri, job.run_id, job.run_folder) if rank == 0 else None
    learning_rate = rate_of_step(job.settings)
    reporter = progress.Reporter(job.progress_file) if rank == 0 else None
    devices = context.get_world_size() * (1 if job.gpu else job.cpus)
    meter = Meter(job.run_folder, devices) if rank == 0 else None

    def report(metrics: dict[str, float], step: int) -> None:
        if writer:
            writer.log(metrics, step)
        if job.reports_to_ray and "valid_loss" in metrics:  # it holds the loop until Ray's controller looks
            ray.train.report({"step": step, **metrics})

    def show(state: State, loss: float) -> None:
        if reporter and meter:
            meter.step()
            valid = f"valid ppl {state.validation_curve[-1]['valid_ppl']:.2f}, " if state.validation_curve else ""
            speed, rate = state.tokens / state.seconds, learning_rate(state.step)
            reporter.progress(state.step, f"loss {loss:.3f}, {valid}{speed:,.0f} tokens/s, rate {rate:.1e}")

    try:
        train_rank(
            job.settings,
            job.data,
            job.run_folder,
            rank=rank,
            num_ranks=context.get_world_size(),
            device=get_device(),
            report=report,
            progress=show,
            say=reporter.say if reporter else lambda line: None,
        )
    except (NotFiniteError, ValueError) as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        if context.get_world_size() > 1:
            raise  # the other workers wait for this one: Ray has to end them
        return f"out of memory: {_last_line(error)}; lower hardware.micro_batch_tokens, or take more workers"
    finally:
        if reporter and writer and meter:
            reporter.flush()
            meter.write()
            writer.close()
    return None


def write_model(run: Trained, settings: Settings, root: Path, target: Path) -> dict[str, Any]:
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


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


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


if __name__ == "__main__":
    main()
