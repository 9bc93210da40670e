"""What runs in the processes of Ray Train: a worker of training, what they need to reach each other, and who starts
and watches them.

The driver (train.py) sends these by name. MLflow is not imported here, for each of Ray's processes would wait for it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device

from pipeline.cluster import progress
from pipeline.cluster.accounting import UsageRecorder
from pipeline.common.environment import RUN_STORAGE_ENV
from pipeline.common.paths import ENCODED
from pipeline.common.settings import Settings
from pipeline.common.storage import AnyPath, as_os_error
from pipeline.data.published import fetch
from pipeline.training import checkpoint
from pipeline.training.loop import NotFiniteError, TrainState
from pipeline.training.trainer import rate_of_step, train_rank


@dataclass(frozen=True)
class Job:
    """What the driver sends to every worker. All paths are absolute: a worker runs in a folder of its own, perhaps on
    another machine, where the data are those that were `published`."""

    settings: Settings
    data: Path
    published: AnyPath | None
    run_folder: AnyPath
    tracking_uri: str
    run_id: str
    cpus: int
    gpu: bool
    reports_to_ray: bool

    @property
    def progress_file(self) -> AnyPath:
        return self.run_folder / "progress.json"


def work(config: dict[str, Any]) -> str | None:
    """One worker: the loop, with Ray's ranks, a progress bar, and curves to MLflow from rank 0. Returns what
    stopped it if every further attempt would stop there too; other errors are Ray's, which starts again."""
    job: Job = config["job"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(job.cpus)
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    writer = None
    learning_rate = rate_of_step(job.settings)
    reporter = progress.Reporter(job.progress_file) if rank == 0 else None
    devices = context.get_world_size() * (1 if job.gpu else job.cpus)
    meter = UsageRecorder(job.run_folder, devices) if rank == 0 else None

    def report(metrics: dict[str, float], step: int) -> None:
        nonlocal writer
        if rank == 0:
            from pipeline.tracking.metric_writer import MetricWriter  # here: the first step does not wait for it

            writer = writer or MetricWriter(job.tracking_uri, job.run_id)
            writer.log(metrics, step)
        if job.reports_to_ray and "valid_loss" in metrics:  # it holds the loop until Ray's controller looks
            ray.train.report({"step": step, **metrics})

    def show(state: TrainState, loss: float) -> None:
        if reporter and meter:
            meter.step()
            valid = f"valid ppl {state.validation_curve[-1]['valid_ppl']:.2f}, " if state.validation_curve else ""
            speed, rate = state.tokens / state.seconds, learning_rate(state.step)
            reporter.progress(state.step, f"loss {loss:.3f}, {valid}{speed:,.0f} tokens/s, rate {rate:.1e}")

    try:
        with as_os_error(job.run_folder):
            if not settings_file(job.run_folder).exists():
                raise OSError(
                    f"{job.run_folder} lacks what the driver wrote: is {RUN_STORAGE_ENV} the same on this node?"
                )
        train_rank(
            job.settings,
            fetch(job.published) / ENCODED if job.published else job.data,
            job.run_folder,
            rank=rank,
            num_ranks=context.get_world_size(),
            device=get_device(),
            report=report,
            progress=show,
            log=reporter.say if reporter else lambda line: None,
        )
    except NotFiniteError as error:  # on all workers alike
        return str(error)
    except (ValueError, checkpoint.DiskFullError, torch.OutOfMemoryError) as error:
        if context.get_world_size() > 1:
            raise  # the other workers wait for this one: Ray has to end them
        if isinstance(error, torch.OutOfMemoryError):
            return f"out of memory: {last_line(error)}; lower hardware.micro_batch_tokens, or take more workers"
        return str(error)
    finally:
        if reporter and meter:
            reporter.close()
            meter.close()
        if writer:
            writer.close()
    return None


def settings_file(run_folder: AnyPath) -> AnyPath:
    """What a run was made with; that a worker finds it shows that it has the driver's storage before it."""
    return run_folder / "settings.json"


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
