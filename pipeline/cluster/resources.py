"""What the nodes of the cluster have, and the share of each worker."""

import os
from collections.abc import Sequence
from typing import Any

import ray
import torch

from pipeline.common.settings import Hardware


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def this_node_resource() -> str:
    """Ray's resource of this node alone; request a fraction of it to pin a task to this node."""
    return f"node:{ray.util.get_node_ip_address()}"


def node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of every node that is up; of this machine, where Ray was not started. An autoscaler does not tell
    which ones it could add: it is for workers beyond the least number of hardware.num_workers = [least, most]."""
    if not ray.is_initialized():
        return [{"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}]
    return [node["Resources"] for node in alive_nodes()]


def capacity(nodes: Sequence[dict[str, float]], cpus: int, gpu: bool) -> int:
    """Number of workers of so many CPUs, and a GPU each, that fit at once; none is spread over two nodes."""
    return sum(int(min(r.get("CPU", 0) // cpus, r.get("GPU", 0) if gpu else float("inf"))) for r in nodes)


def share_of_each_worker(hardware: Hardware) -> tuple[bool, int]:
    """Whether each worker gets a GPU, and its number of CPUs. Raises ValueError if there are not enough."""
    nodes = node_resources()
    wanted, least = hardware.max_workers, hardware.min_workers
    num_gpus = int(sum(r.get("GPU", 0) for r in nodes))
    num_cpus = int(sum(r.get("CPU", 0) for r in nodes))
    gpu = hardware.device == "gpu" or (hardware.device == "auto" and num_gpus >= least)
    if gpu and num_gpus < least:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with a GPU each: the cluster has {num_gpus}; "
            "lower it, or set hardware.device to cpu"
        )
    cpus = hardware.cpus_per_worker
    if not cpus:  # as many as all can have, else as many as the least number of them can have
        each = [c for n in (wanted, least) for c in range(num_cpus // n, 0, -1) if capacity(nodes, c, gpu) >= n]
        cpus = each[0] if each else 1
    if capacity(nodes, cpus, gpu) < least:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with {cpus} CPUs{' and a GPU' if gpu else ''} each: "
            f"the cluster has {num_cpus} on {len(nodes)} nodes, room for {capacity(nodes, cpus, gpu)}; "
            "lower it, or hardware.cpus_per_worker; [least, most] takes what there is"
        )
    return gpu, cpus
