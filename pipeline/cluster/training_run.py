"""One training run from the driver's view: the MLflow run, Ray's workers, the curves."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from pipeline.cluster import progress
from pipeline.cluster.accounting import total_usage
from pipeline.cluster.preflight import versions
from pipeline.cluster.ray_cluster import started_here
from pipeline.cluster.ray_worker import Job, last_line, settings_file, work
from pipeline.cluster.reachable_torch import ReachableTorch
from pipeline.cluster.resources import alive_nodes, share_of_each_worker
from pipeline.cluster.torch_trainer import make_trainer
from pipeline.common.atomic_io import write_json
from pipeline.common.environment import RAY_TRAIN_ELASTIC, environment
from pipeline.common.paths import ENCODED
from pipeline.common.settings import Hardware, Settings
from pipeline.common.storage import PATIENCE_S, AnyPath, tracking_uri
from pipeline.training import checkpoint
from pipeline.training.loop import TrainState
from pipeline.training.run import TrainResult, log, run_folder, run_key


class TrainingError(RuntimeError):
    """Training did not come to its end; says why, and what to do."""


@contextmanager
def training(
    settings: Settings,
    root: Path,
    published: AnyPath | None,
    tags: Mapping[str, str] | None = None,
    key: str | None = None,
    show: bool = True,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> Iterator[TrainResult]:
    """Train to the end on the Ray cluster at hand, then run the block; the MLflow run is open until the block ends.

    `published` is where other machines find the data, None if there are none. `tags` go to the MLflow run, which is
    found again by `key` (default: `run_key`); `show` draws a progress bar. With `callbacks`, Ray gets the metrics of
    every validation. Training that is finished needs no cluster. Raises as `train`.
    """
    from pipeline.tracking.runs import finish_run, open_run, run_guard

    key, folder = key or run_key(settings, root), run_folder(settings, root)
    uri = tracking_uri(root)
    state = checkpoint.finished_state(folder)
    if state and show:
        log(f"trained already, to step {state.step}; to train again, delete {folder}")
    gpu, cpus = (False, 0) if state else share_of_each_worker(settings.hardware)
    makeup = {} if state else _makeup(settings.hardware, gpu, cpus)
    last_sign_at = None if state else total_usage(folder).last_sign_at
    run_id = open_run(uri, settings, key, makeup | dict(tags or {}), root, last_sign_at)
    with run_guard(uri, run_id):
        if state is None:
            job = Job(
                settings, root / ENCODED, published, folder, uri, run_id, cpus, gpu, reports_to_ray=bool(callbacks)
            )
            state = _fit(job, show, list(callbacks))
        _complete_curves(uri, run_id, state)
        yield TrainResult(key, run_id, folder, state, uri)
    finish_run(uri, run_id)


def _makeup(hardware: Hardware, gpu: bool, cpus: int) -> dict[str, str]:
    """The cluster's, as tags."""
    least, most = hardware.min_workers, hardware.max_workers
    return {
        "workers": str(most) if least == most else f"{least} to {most}",
        "device": "gpu" if gpu else "cpu",
        "cpus_per_worker": str(cpus),
        "nodes": str(len(alive_nodes())),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def _fit(job: Job, show: bool, callbacks: list[ray.train.UserCallback]) -> TrainState:
    """Run the workers until training is done, starting dead ones again; the state of the last checkpoint."""
    hardware = job.settings.hardware
    resources = {"CPU": job.cpus} | ({"GPU": 1} if job.gpu else {})
    elastic = hardware.min_workers < hardware.max_workers
    num_workers = (hardware.min_workers, hardware.max_workers) if elastic else hardware.max_workers
    shown = progress.shown(job.progress_file, job.settings.train.max_steps, "train") if show else nullcontext()
    write_json(settings_file(job.run_folder), asdict(job.settings))
    try:
        with shown, environment(RAY_TRAIN_ELASTIC if elastic else {}, {}), tempfile.TemporaryDirectory() as rays_own:
            result = make_trainer(
                work,
                train_loop_config={"job": job},
                private=started_here(),
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
    state = checkpoint.finished_state(job.run_folder)
    if state is None:
        raise TrainingError(f"training ended, but its last checkpoint is not in {job.run_folder}, or damaged")
    return state


def _complete_curves(uri: str, run_id: str, state: TrainState) -> None:
    """Points that a worker had to leave behind; and all, if this MLflow run is new to training that was done."""
    from pipeline.tracking.metric_writer import MetricWriter

    writer = MetricWriter(uri, run_id)
    for point in sorted([*state.training_curve, *state.validation_curve], key=lambda point: point["step"]):
        writer.log({key: value for key, value in point.items() if key != "step"}, int(point["step"]))
    writer.close(PATIENCE_S)
