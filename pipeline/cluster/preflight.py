"""Check a cluster of several nodes before a run starts on it."""

import os
import platform
import time
import uuid
from contextlib import suppress

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.resources import alive_nodes
from pipeline.common.atomic_io import write_text
from pipeline.common.environment import (
    RAY_JOB_ENV,
    RUN_STORAGE_ENV,
    TRACKING_URI_ENV,
    is_private,
    without_passwords,
)
from pipeline.common.settings import Hardware
from pipeline.common.storage import AnyPath, as_os_error, run_storage_is_set
from pipeline.data.published import fetch
from pipeline.data.workspace import Workspace

PROBE_S = 300
"""Seconds. A node that runs our code for the first time has to unpack it and to import torch."""


def preflight(hardware: Hardware, workspace: Workspace) -> None:
    """Find faults that would stop training later with an unclear error. Raises ValueError with the setting to change.

    All nodes of a cluster must reach the storage, the data and the MLflow store, and must have the same versions. A
    job must not keep files in its working folder, because Ray deletes that after the job.
    """
    if is_private():
        return
    alive, job = alive_nodes(), RAY_JOB_ENV in os.environ
    if len(alive) == 1 and not job and hardware.max_workers == hardware.min_workers:
        return
    why = f"the cluster has {len(alive)} nodes" if len(alive) > 1 else "more nodes may join the cluster"
    if job:
        why = f"{why}, and Ray deletes a job's folder after the job"
    if not run_storage_is_set():
        raise ValueError(
            f"{why}, but {RUN_STORAGE_ENV} is not set: set it to a folder that all nodes share, or to a URI such as "
            "s3://bucket/runs, for checkpoints and data (and run python -m pipeline.publish once)"
        )
    if is_local_store(workspace.tracking_uri):
        raise ValueError(
            f"{why}, but {TRACKING_URI_ENV} is {workspace.tracking_uri}, a file: "
            "start a server (mlflow server) and set it to the server's address"
        )
    probe = workspace.storage / f".probe-{uuid.uuid4().hex}"
    write_text(probe, "")
    look = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    tasks = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            probe, workspace.published, workspace.tracking_uri, versions()
        )
        for node in alive
    ]
    deadline = time.monotonic() + PROBE_S
    try:
        for node, task in zip(alive, tasks, strict=True):
            try:
                problem = ray.get(task, timeout=max(1.0, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:
                problem = f"does not run our code ({' '.join(str(error).split())[-300:]})"
            if problem:
                raise ValueError(f"node {node['NodeManagerAddress']} {problem}")
    finally:
        with suppress(OSError), as_os_error(probe):
            probe.unlink()


def is_local_store(tracking_uri: str) -> bool:
    """Whether MLflow's store is a file, which other machines cannot reach."""
    return tracking_uri.startswith(("sqlite", "file:", "/")) or ":" not in tracking_uri


def versions() -> dict[str, str]:
    """The versions that must be equal on all nodes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],  # the driver may have a build for CPUs, the workers one for GPUs
        "ray": ray.__version__,
    }


def probe_node(probe: AnyPath, published: AnyPath | None, tracking_uri: str, expected: dict[str, str]) -> str | None:
    """Check the node that runs this; return its fault, or None if it has none."""
    if (ours := versions()) != expected:
        return f"has {ours}, but the driver has {expected}: give all nodes the same image"
    own = probe.with_name(f"{probe.name}-{uuid.uuid4().hex}")
    try:
        with as_os_error(probe):
            probe.read_text(encoding="utf-8")
            own.write_text("", encoding="utf-8")
            own.unlink()
    except (OSError, ImportError) as error:
        return (
            f"cannot read and write {probe.parent} ({error}): set {RUN_STORAGE_ENV} to a folder that all nodes "
            "share, or to a URI such as s3://bucket/runs"
        )
    if published:
        try:
            fetch(published)
        except (OSError, ValueError) as error:
            return f"cannot read the corpus: {error}"
    from pipeline.tracking.store import server_answers  # a late import, because MLflow takes seconds

    if not server_answers(tracking_uri):
        address = without_passwords(tracking_uri)
        return f"gets no answer from {address}: set MLFLOW_TRACKING_URI to an address that all nodes reach"
    return None
