"""The CPUs and GPUs of the nodes, and how many each worker gets."""

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
    """Ray's resource that only this node has; request a fraction of it to pin a task to this node."""
    return f"node:{ray.util.get_node_ip_address()}"


def node_resources() -> list[dict[str, float]]:
    """CPUs and GPUs of every node that is alive, or of this machine if Ray is not started.

    Nodes that an autoscaler could add are unknown: they serve only the workers beyond `least` in hardware.num_workers
    = [least, most].
    """
    if not ray.is_initialized():
        return [{"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}]
    return [node["Resources"] for node in alive_nodes()]


def capacity(nodes: Sequence[dict[str, float]], cpus: int, gpu: bool) -> int:
    """How many workers fit at once, with `cpus` CPUs each and, if `gpu`, one GPU. No worker spans two nodes."""
    return sum(int(min(r.get("CPU", 0) // cpus, r.get("GPU", 0) if gpu else float("inf"))) for r in nodes)


def share_of_each_worker(hardware: Hardware) -> tuple[bool, int]:
    """Return whether each worker gets a GPU, and its number of CPUs. Raises ValueError if there are not enough."""
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
    if not cpus:  # the most that fits with max_workers, or if these do not fit, with min_workers
        each = [c for n in (wanted, least) for c in range(num_cpus // n, 0, -1) if capacity(nodes, c, gpu) >= n]
        cpus = each[0] if each else 1
    if capacity(nodes, cpus, gpu) < least:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with {cpus} CPUs{' and a GPU' if gpu else ''} each: "
            f"the cluster has {num_cpus} on {len(nodes)} nodes, room for {capacity(nodes, cpus, gpu)}; "
            "lower it, or hardware.cpus_per_worker, or write [least, most] to use as many as fit"
        )
    return gpu, cpus
