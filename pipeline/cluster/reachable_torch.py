"""torch.distributed between the addresses by which Ray reaches its nodes.

By themselves Gloo and NCCL take the address of the host's name, which on many a machine is 127.0.1.1. The variables
that name an interface have to be set in each worker, after it knows its node and before its process group is made:
of Ray Train's hooks only the backend's on_start comes at that moment.
"""

from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from pipeline.common.environment import NETWORK_INTERFACE_ENVS, set_defaults


class ReachableTorch(TorchConfig):
    """Ray's TorchConfig, with the interface of Ray's own address; a single worker gets no process group."""

    @property
    def backend_cls(self) -> type:
        return _ReachableBackend


class _ReachableBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # Ray's class for torch, by its public way
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:  # nobody to reach, and Gloo's thread would keep waking up
            return
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _name_interface() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            set_defaults(dict.fromkeys(NETWORK_INTERFACE_ENVS, name))
