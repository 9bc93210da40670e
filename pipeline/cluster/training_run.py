"""Run training from the driver: open the MLflow run, train on Ray's workers or in this process, log the curves."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline.cluster.accounting import carry_usage, total_usage
from pipeline.cluster.preflight import versions
from pipeline.cluster.progress import show_progress
from pipeline.cluster.ray_worker import WorkerConfig, last_line, run_alone, run_worker, settings_file
from pipeline.cluster.reachable_torch import ReachableTorch
from pipeline.cluster.resources import node_resources, share_of_each_worker
from pipeline.common.atomic_io import write_json
from pipeline.common.environment import IN_PROCESS, RAY_TRAIN_ELASTIC, environment
from pipeline.common.settings import Hardware, Settings
from pipeline.common.storage import PATIENCE_S, AnyPath
from pipeline.data.workspace import Workspace
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState
from pipeline.training.run import TrainResult, log
from pipeline.training.siblings import all_of_trajectory, origin_of


class TrainingError(RuntimeError):
    """Training did not finish. The message has the reason and the way out."""


@contextmanager
def training_run(
    settings: Settings,
    workspace: Workspace,
    key: str,
    folder: AnyPath,
    finished: TrainState | None,
    *,
    in_process: bool,
    tags: Mapping[str, str] | None = None,
    show: bool = True,
    on_validation: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> Iterator[TrainResult]:
    """Train to the end, then run the block. The MLflow run stays open until the block ends.

    - `key` identifies the MLflow run, which is reopened if it exists and gets `tags`.
    - `folder` gets the checkpoints. checkpoint.py writes them, and explains why Ray does not.
    - `finished` is the result of `finished_state(folder, ...)`. A finished training is not repeated and needs no
      cluster.
    - `in_process` trains in this process, as the only worker and without Ray's processes; otherwise training runs on
      the Ray cluster that `ray_cluster` started or joined.
    - `show` draws a progress bar.
    - `on_validation` is called in the workers with the metrics of every validation.
    - `callbacks` are Ray Train's, on a cluster.

    Raises TrainingError, and ValueError or OSError with a one-line message for what a user can fix.
    """
    from pipeline.tracking.runs import finish_run, open_run, run_guard

    uri, all_tags = workspace.tracking_uri, dict(tags or {})
    if origin := origin_of(folder):
        carry_usage(origin.folder, folder, origin.share)
        all_tags["continues"] = origin.description
    gpu, cpus, last_sign_at, state = False, 0, None, finished
    if state is None:
        gpu, cpus = share_of_each_worker(settings.hardware)
        all_tags = _cluster_tags(settings.hardware, gpu, cpus) | all_tags
        last_sign_at = total_usage(folder).last_sign_at
    elif show:
        log(f"already trained to step {state.step}; to train again, delete {all_of_trajectory(folder)}")
    run_id = open_run(uri, settings, key, all_tags, workspace.root, folder, last_sign_at)
    with run_guard(uri, run_id):
        if state is None:
            config = WorkerConfig(settings, workspace, folder, run_id, cpus, gpu, on_validation)
            bar = show_progress(config.progress_file, settings.train.max_steps, "train") if show else nullcontext()
            write_json(settings_file(folder), asdict(settings))
            with bar:
                stopped_by = _run_here(config) if in_process else _run_workers(config, list(callbacks))
            if stopped_by:
                raise TrainingError(stopped_by)
            state = checkpoint.finished_state(folder, settings.train)
            if state is None:
                raise TrainingError(
                    f"training ended, but its last checkpoint is missing in {folder} or damaged: run again to repeat "
                    "the last steps"
                )
        _complete_curves(uri, run_id, state)
        yield TrainResult(key, run_id, folder, state, uri)
    finish_run(uri, run_id)


def _cluster_tags(hardware: Hardware, gpu: bool, cpus: int) -> dict[str, str]:
    least, most = hardware.min_workers, hardware.max_workers
    return {
        "run.workers": str(most) if least == most else f"{least} to {most}",
        "device": "gpu" if gpu else "cpu",
        "run.cpus_per_worker": str(cpus),
        "run.nodes": str(len(node_resources())),
        "run.versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _run_here(config: WorkerConfig) -> str | None:
    """Train in this process, in Ray Train's local mode; return why it stopped early, or None."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it logs that it is in local mode
    with environment({}, IN_PROCESS):
        trainer = TorchTrainer(
            run_alone,  # type: ignore[arg-type]
            train_loop_config={"worker": config},
            scaling_config=ScalingConfig(num_workers=0, use_gpu=config.gpu),
        )
        return trainer.fit().return_value  # type: ignore[attr-defined]  # mypy sees Ray Train v1 here and below


def _run_workers(config: WorkerConfig, callbacks: list[ray.train.UserCallback]) -> str | None:
    """Run Ray's workers until training is done, and restart dead ones; return why it stopped early, or None."""
    folder, hardware = config.run_folder, config.settings.hardware
    elastic = hardware.min_workers < hardware.max_workers
    try:
        with environment(RAY_TRAIN_ELASTIC if elastic else {}, {}), tempfile.TemporaryDirectory() as rays_own:
            result = TorchTrainer(
                run_worker,  # type: ignore[arg-type]
                train_loop_config={"worker": config},
                torch_config=ReachableTorch(),
                scaling_config=ScalingConfig(
                    num_workers=(hardware.min_workers, hardware.max_workers) if elastic else hardware.max_workers,  # type: ignore[arg-type]
                    use_gpu=config.gpu,
                    resources_per_worker={"CPU": config.cpus} | ({"GPU": 1} if config.gpu else {}),
                ),
                run_config=RunConfig(
                    name=folder.name,
                    storage_path=rays_own,  # Ray saves no checkpoint: ours have checksums and resume bit for bit
                    failure_config=FailureConfig(max_failures=hardware.max_failures),
                    callbacks=callbacks,  # type: ignore[arg-type]
                    logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
                ),
            ).fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training failed: {last_line(error)}; run again to resume from the last checkpoint"
        ) from error
    return result.return_value  # type: ignore[attr-defined]


def _complete_curves(uri: str, run_id: str, state: TrainState) -> None:
    """Log the points that a worker could not deliver, or all points if training was done before this MLflow run."""
    from pipeline.tracking.metric_writer import MetricWriter

    writer = MetricWriter(uri, run_id)
    for point in sorted([*state.training_curve, *state.validation_curve], key=lambda point: point["step"]):
        writer.log({key: value for key, value in point.items() if key != "step"}, int(point["step"]))
    writer.close(PATIENCE_S)
