"""Run torch.distributed on the network addresses that Ray uses for its nodes.

Without it, Gloo and NCCL use the address of the host name, which is 127.0.1.1 on many machines. The variables that
name an interface must be set in each worker after it is placed on a node and before its process group is made. Among
Ray Train's hooks, only the backend's on_start runs then.
"""

from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from pipeline.common.environment import NETWORK_INTERFACE_ENVS, set_defaults


class ReachableTorch(TorchConfig):
    """Ray's TorchConfig on the network interface that Ray uses. A single worker gets no process group."""

    @property
    def backend_cls(self) -> type:
        return _ReachableBackend


class _ReachableBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # the public way to Ray's class for torch
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:  # no other worker to reach, and Gloo's thread would keep waking up
            return
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            set_defaults(dict.fromkeys(NETWORK_INTERFACE_ENVS, name))
