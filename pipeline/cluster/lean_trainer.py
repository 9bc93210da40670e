"""Ray's TorchTrainer without the processes that this project does not need: each takes as long to start as a worker.

Measured (commit 7a9dae8, Ray 2.60, two CPU cores): the first step came 14.7 s after the command, not 27 to 33 s,
in part because MLflow's store is opened meanwhile.

This overrides private methods of Ray Train, as they are in RAY_VERSION. Import it through torch_trainer.py alone,
which falls back to Ray's own TorchTrainer with another Ray, if the import fails, or if PLAIN_RAY_TRAIN is set.
"""

import asyncio
import signal
import threading
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

RAY_VERSION = "2.60"


class LeanTrainer(TorchTrainer):
    """Never starts what hands out Ray's datasets. On a Ray that ends with this driver, `private`, it also leaves out
    what asks an autoscaler for nodes and what frees the resources of a controller that died; and the controller,
    which starts workers, watches them and restarts dead ones, runs in the driver (so not inside an event loop)."""

    def __init__(self, *arguments: Any, private: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.private = private

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        idle: tuple[type, ...] = (DatasetsCallback,)
        if self.private:
            idle += (PlacementGroupCleanerCallback, StateManagerCallback)
            if isinstance(parts["scaling_policy"], FixedScalingPolicy):
                parts["scaling_policy"] = _NoAutoscaler(self.scaling_config)  # type: ignore[arg-type]
        parts["callbacks"] = [callback for callback in parts["callbacks"] if not isinstance(callback, idle)]
        if not self.private:
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]
        controller = _ControllerInDriver(**parts)
        asyncio.run(controller.run())
        return controller.get_result()


class _NoAutoscaler(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _WorkersOfDriver(WorkerGroup):
    """Workers get no handle of the controller, which is no actor here. They would ask it for the checkpoints that
    were reported to Ray; ours report none."""

    def _init_train_context_on_workers(
        self, workers: Sequence[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(tasks)
        self._decorate_worker_log_file_paths(list(workers))


class _ControllerInDriver(TrainController):
    worker_group_cls = _WorkersOfDriver

    async def run(self) -> None:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            # Ctrl-C at once. asyncio's way waits for an await, and while workers start there is none.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        await super().run()


for _owner, _method in (
    (TorchTrainer, "_initialize_and_run_controller"),
    (FixedScalingPolicy, "after_controller_start"),
    (FixedScalingPolicy, "_maybe_send_resource_request"),
    (WorkerGroup, "_init_train_context_on_workers"),
    (WorkerGroup, "_decorate_worker_log_file_paths"),
    (TrainController, "worker_group_cls"),
):
    getattr(_owner, _method)  # AttributeError here rather than a method that nobody calls
