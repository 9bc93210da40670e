"""Ray's TorchTrainer without the processes that this project does not need."""

import asyncio
import signal
import threading
from typing import Any
from unittest.mock import patch

import psutil
import ray
import ray.train
from ray.runtime_context import RuntimeContext
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from pipeline.common.environment import NETWORK_INTERFACE_ENVS, set_defaults


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
            set_defaults(dict.fromkeys(NETWORK_INTERFACE_ENVS, name))


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
