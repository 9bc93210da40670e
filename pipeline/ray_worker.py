"""What runs in the processes of Ray Train: a worker of training, what they need to reach each other, and who starts
and watches them.

The driver (train.py) sends these by name. MLflow is not imported here, for each of Ray's processes would wait for it.
"""

import asyncio
import logging
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
import ray.train
import torch
from ray.runtime_context import RuntimeContext
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from pipeline import checkpoint, progress
from pipeline.corpus import ENCODED
from pipeline.loop import NotFiniteError, State
from pipeline.params import Settings
from pipeline.publish import fetch
from pipeline.storage import VARIABLE, Folder, errors_of
from pipeline.usage import Meter
from pipeline.worker import rate_of_step, train_rank


@dataclass(frozen=True)
class Job:
    """What the driver sends to every worker. All paths are absolute: a worker runs in a folder of its own, perhaps on
    another machine, where the data are those that were `published`."""

    settings: Settings
    data: Path
    published: Folder | None
    run_folder: Folder
    tracking_uri: str
    run_id: str
    cpus: int
    gpu: bool
    reports_to_ray: bool

    @property
    def progress_file(self) -> Folder:
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
    meter = Meter(job.run_folder, devices) if rank == 0 else None

    def report(metrics: dict[str, float], step: int) -> None:
        nonlocal writer
        if rank == 0:
            from pipeline.tracking import MetricWriter  # here: the first step does not wait for MLflow's import

            writer = writer or MetricWriter(job.tracking_uri, job.run_id)
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
        with errors_of(job.run_folder):
            if not settings_file(job.run_folder).exists():
                raise OSError(f"{job.run_folder} lacks what the driver wrote: is {VARIABLE} the same on this node?")
        train_rank(
            job.settings,
            fetch(job.published) / ENCODED if job.published else job.data,
            job.run_folder,
            rank=rank,
            num_ranks=context.get_world_size(),
            device=get_device(),
            report=report,
            progress=show,
            say=reporter.say if reporter else lambda line: None,
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


def settings_file(run_folder: Folder) -> Folder:
    """What a run was made with; that a worker finds it shows that it has the driver's storage before it."""
    return run_folder / "settings.json"


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


class ReachableTorch(TorchConfig):
    """torch.distributed between the addresses by which Ray reaches its nodes. By themselves Gloo and NCCL take the
    address of the host's name, which on many a machine is 127.0.1.1."""

    @property
    def backend_cls(self) -> type:
        return _ReachableBackend


class _ReachableBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:  # nobody to reach, and Gloo's thread would keep waking up
            return
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    """In a worker, before its process group is made."""
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


class LeanTrainer(TorchTrainer):
    """Without those of Ray's processes that have nothing to do here: each takes as long to start as a worker.

    What hands out Ray's datasets is never needed. On a Ray that ends with this driver, `private`, neither is what
    asks an autoscaler for nodes, nor what gives back the room of a controller that died; and the controller, which
    starts workers, watches them and starts dead ones again, is at work in the driver (so not where an event loop of
    asyncio is running).
    """

    def __init__(self, *arguments: Any, private: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.private = private

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        idle: tuple[type, ...] = (DatasetsCallback,)
        if self.private:
            idle += (PlacementGroupCleanerCallback, StateManagerCallback)
            if isinstance(parts["scaling_policy"], FixedScalingPolicy):
                parts["scaling_policy"] = _NothingToAskFor(self.scaling_config)  # type: ignore[arg-type]
        parts["callbacks"] = [callback for callback in parts["callbacks"] if not isinstance(callback, idle)]
        if not self.private:
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
        controller = _ControllerHere(**parts)
        asyncio.run(controller.run())
        return controller.get_result()


class _NothingToAskFor(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkersWithoutController(WorkerGroup):
    """Workers may ask the controller, an actor, for the checkpoints that were reported to Ray. Ours report none."""

    def _init_train_context_on_workers(self, *arguments: Any, **named: Any) -> None:
        with patch.object(RuntimeContext, "current_actor", None):  # there is none in a driver: Ray raises
            super()._init_train_context_on_workers(*arguments, **named)


class _ControllerHere(TrainController):
    worker_group_cls = _WorkersWithoutController

    async def run(self) -> None:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            # Ctrl-C at once. asyncio's way waits for an await, and while workers start there is none.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        await super().run()
