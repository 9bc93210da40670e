"""The function that each worker of Ray Train runs: it trains one rank; rank 0 reports progress, curves and usage.

The driver (training_run.py) passes `run_worker` to Ray Train, or `run_alone` to Ray Train's local mode. MLflow is not
imported at the top, because each of Ray's processes would wait for it.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray.train
import torch
from ray.train.torch import get_device

from pipeline.cluster.accounting import UsageRecorder
from pipeline.cluster.progress import PROGRESS_FILE, ProgressReporter, training_text
from pipeline.common.environment import RUN_STORAGE_ENV
from pipeline.common.paths import ENCODED
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, as_os_error
from pipeline.data.workspace import Workspace
from pipeline.inference.sample_scores import SampleScorer
from pipeline.training import checkpoint
from pipeline.training.loop import NotFiniteError, TrainState
from pipeline.training.trainer import train_rank

MEASURED = ("tokens_per_second",)
"""Metrics that differ when a step is repeated after a resume: MLflow would keep both values as two points."""


@dataclass(frozen=True)
class WorkerConfig:
    """The driver's arguments to every worker."""

    settings: Settings
    workspace: Workspace
    run_folder: AnyPath
    run_id: str
    cpus: int
    gpu: bool
    on_validation: Callable[[dict[str, Any]], None] | None
    """ray.train.report or ray.tune.report; called with the metrics of every validation."""

    @property
    def progress_file(self) -> AnyPath:
        return self.run_folder / PROGRESS_FILE


class Place(NamedTuple):
    """The ranks of a worker, among all workers and on its node. The defaults are those of a single worker."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    node_rank: int = 0


def run_worker(options: dict[str, Any]) -> str | None:
    """Train the rank of this Ray Train worker; return the result of `_train`."""
    context = ray.train.get_context()
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    place = Place(
        rank=context.get_world_rank(),
        num_ranks=context.get_world_size(),
        local_rank=context.get_local_rank(),
        node_rank=context.get_node_rank(),
    )
    return _train(options["worker"], place, get_device())


def run_alone(options: dict[str, Any]) -> str | None:
    """Train the only rank, in the calling process; return the result of `_train`.

    It does not ask Ray Train for rank and device, because these functions raise in a process of Ray Tune.
    """
    config: WorkerConfig = options["worker"]
    num_threads = torch.get_num_threads()
    try:
        return _train(config, Place(), torch.device("cuda" if config.gpu else "cpu"))
    finally:
        torch.set_num_threads(num_threads)


def _train(config: WorkerConfig, place: Place, device: torch.device) -> str | None:
    """Train one rank. Return None when training is done, or the reason why it stopped if a retry would stop for the
    same reason. Raises errors that a retry may overcome."""
    rank, num_ranks = place.rank, place.num_ranks
    torch.set_num_threads(config.cpus)
    reports = _Reports(config, num_ranks) if rank == 0 else None
    patience_s = 60.0

    def report(metrics: dict[str, float], step: int) -> None:
        if reports:
            reports.log_metrics(metrics, step)
        if config.on_validation and "valid_loss" in metrics:  # blocks until Ray has read them
            config.on_validation({"step": step, **metrics})

    try:
        _check_storage(config.run_folder)
        data_root, scored = config.workspace.data_root(), config.settings.train.bleu_sentences > 0
        with _system_metrics(config, place):
            train_rank(
                config.settings,
                data_root / ENCODED,
                config.run_folder,
                rank=rank,
                num_ranks=num_ranks,
                device=device,
                report=report,
                progress=reports.step_done if reports else lambda state, loss: None,
                log=reports.log if reports else lambda message: None,
                saved=reports.saved if reports else lambda: None,
                score=SampleScorer(config.settings, data_root) if reports and scored else None,
            )
    except NotFiniteError as error:  # raised on all workers
        return str(error)
    except (ValueError, checkpoint.DiskFullError, torch.OutOfMemoryError) as error:
        if num_ranks > 1:
            raise  # the other workers wait for this one, so Ray must stop them
        if isinstance(error, torch.OutOfMemoryError):
            return f"out of memory: {last_line(error)}; lower hardware.micro_batch_tokens, or use more workers"
        return str(error)
    except (KeyboardInterrupt, SystemExit):
        patience_s = 5.0
        raise
    finally:
        if reports:
            reports.close(patience_s)
    return None


def _system_metrics(config: WorkerConfig, place: Place) -> AbstractContextManager[None]:
    """Log the system metrics of this node; only its first worker does."""
    if not config.settings.tracking.system_metrics or place.local_rank != 0:
        return nullcontext()
    from pipeline.tracking.system_metrics import system_metrics

    node = f"node_{place.node_rank}" if place.num_ranks > 1 else None
    return system_metrics(config.workspace.tracking_uri, config.run_id, node)


class _Reports:
    """The reports of rank 0: progress to the driver, usage to the run's folder, curves to MLflow."""

    def __init__(self, config: WorkerConfig, num_ranks: int) -> None:
        self._config = config
        self._progress = ProgressReporter(config.progress_file)
        devices = num_ranks * (1 if config.gpu else config.cpus)
        self._usage = UsageRecorder(config.run_folder, devices, config.gpu)
        self._curves: Any = None  # a MetricWriter, from the first metrics on
        self._measured: deque[tuple[dict[str, float], int]] = deque()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics to MLflow at once, except those in MEASURED, which wait until a checkpoint includes the step
        (`saved`)."""
        if self._curves is None:
            from pipeline.tracking.metric_writer import MetricWriter  # late: the first step does not wait for MLflow

            self._curves = MetricWriter(self._config.workspace.tracking_uri, self._config.run_id)
        self._curves.log({key: value for key, value in metrics.items() if key not in MEASURED}, step)
        self._measured.append(({key: value for key, value in metrics.items() if key in MEASURED}, step))

    def saved(self) -> None:
        while self._measured:
            self._curves.log(*self._measured.popleft())

    def step_done(self, state: TrainState, loss: float) -> None:
        self._usage.count_step()
        valid_ppl = state.validation_curve[-1]["valid_ppl"] if state.validation_curve else None
        self._progress.progress(state.step, training_text(loss, valid_ppl, state.tokens / state.seconds))

    def log(self, message: str) -> None:
        self._progress.log(message)

    def close(self, patience_s: float) -> None:
        self._progress.close()
        self._usage.close()
        if self._curves is not None:
            self._curves.close(patience_s)


def settings_file(run_folder: AnyPath) -> AnyPath:
    """The file to which the driver writes a run's settings. If a worker finds this file, it shares the driver's
    storage."""
    return run_folder / "settings.json"


def _check_storage(run_folder: AnyPath) -> None:
    with as_os_error(run_folder):
        if not settings_file(run_folder).exists():
            raise OSError(f"{run_folder} lacks the driver's settings: give all nodes the same {RUN_STORAGE_ENV}")


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
