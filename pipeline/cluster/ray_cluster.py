"""The Ray cluster that work runs on: started here, or joined; and what would go wrong on it, said before it does."""

import logging
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.common.atomic_io import write_text
from pipeline.common.settings import Hardware
from pipeline.common.storage import RUN_STORAGE_ENV, AnyPath, as_os_error, run_storage_is_set
from pipeline.data.published import fetch

OBJECT_STORE_BYTES = 200_000_000
"""Of Ray on this machine: nothing large passes through it."""
TELEMETRY = ("RAY_USAGE_STATS_ENABLED", "MLFLOW_DISABLE_TELEMETRY")
ENVIRONMENT = (RUN_STORAGE_ENV, "MLFLOW_TRACKING_URI", "GIT_COMMIT", "GIT_DIRTY", *TELEMETRY)
"""What processes on other machines have to know of this one's environment. Secrets are not among it: a node has its
own right to storage and tracking."""
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in what `ray job submit` runs."""
PROBE_S = 300
"""A node that runs our code for the first time unpacks it and imports torch."""
TOKENS = (
    "all nodes, and who submits to them, need the same token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=its file "
    "(ray get-auth-token --generate makes one)"
)


@contextmanager
def ray_cluster(hardware: Hardware, root: Path, dashboard: bool = False) -> Iterator[None]:
    """The cluster of RAY_ADDRESS or of this job, else Ray on this machine for as long as the block takes; with
    `dashboard`, which takes memory, but which Ray needs to clean up after trials that a scheduler ends.

    Raises ValueError or ConnectionError, with one line, if there is no such cluster, or not for us.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that watches cloud nodes
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # from 2 s: the end of training waits for it
    options: dict[str, Any] = {}
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        cpus = max(len(os.sched_getaffinity(0)), hardware.max_workers)
        options = {
            "address": "local",  # never the cluster that somebody started with `ray start` on this machine
            "num_cpus": cpus,
            "include_dashboard": dashboard,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        # Ray's workers leave the processors to its other processes, by a nice of 15. Here the work is all there is.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_enable_metrics_collection", "0")  # nobody reads them
        # One of Ray's helpers asks the dashboard once a second. Without one, it warns each time that it got none,
        # and dies with a traceback when it finds two clusters on this machine: tell it where nobody answers.
        if dashboard:
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # of another cluster
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:9"
    elif address.startswith(("ray://", "http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS is {address!r}: host:port of the head is needed, on a machine of the cluster; "
            "from elsewhere, python -m pipeline.submit or ray job submit"
        )
    elif JOB not in os.environ:  # a job has brought its code and environment along
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        options = {"runtime_env": {"working_dir": str(root), "env_vars": environment}}
    try:
        ray.init(logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **options)
    except Exception as error:  # Ray has no kind of its own for these
        raise ConnectionError(_why_not(error, address)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _why_not(error: Exception, address: str | None) -> str:
    """One line of the many that Ray prints."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "ersion mismatch" in text:
        return (
            f"the cluster at {address} has another version ({text[:300]}): all nodes and the submitting side need "
            f"Python {platform.python_version()} and Ray {ray.__version__}"
        )
    if address and any(word in text.lower() for word in ("token", "unauthenticated", "authentication")):
        return f"the cluster at {address} refuses us ({text[:300]}): {TOKENS}"
    if address:
        return (  # Ray says no more when it is the token
            f"no Ray cluster answers at {address} (RAY_ADDRESS), or not with our token: {text[:300]}; {TOKENS}; "
            "unset RAY_ADDRESS to use this machine alone"
        )
    return f"Ray did not start here: {text[:300]}"


def started_here() -> bool:
    """Whether Ray was started by this process, for itself."""
    inside = ray.get_runtime_context().get_actor_id() is not None
    return not (inside or JOB in os.environ or os.environ.get("RAY_ADDRESS"))


def nodes() -> list[dict[str, Any]]:
    """Those that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def this_node_resource() -> str:
    """A resource that this node alone has: what asks for a bit of it runs here."""
    return f"node:{ray.util.get_node_ip_address()}"


def node_resources() -> list[dict[str, float]]:
    """CPU and GPU of every node that is there. An autoscaler does not say which ones it could add: it is for workers
    beyond the least number of hardware.num_workers = [least, most]."""
    return [node["Resources"] for node in nodes()]


def capacity(rooms: Sequence[dict[str, float]], cpus: int, gpu: bool) -> int:
    """How many workers of so many CPUs, and a GPU each, fit at once; none is spread over two nodes."""
    return sum(int(min(r.get("CPU", 0) // cpus, r.get("GPU", 0) if gpu else float("inf"))) for r in rooms)


def share_of_each_worker(hardware: Hardware) -> tuple[bool, int]:
    """Whether each worker gets a GPU, and its number of CPUs. Raises ValueError if there are not enough."""
    rooms = node_resources()
    wanted, least = hardware.max_workers, hardware.min_workers
    num_gpus = int(sum(r.get("GPU", 0) for r in rooms))
    num_cpus = int(sum(r.get("CPU", 0) for r in rooms))
    gpu = hardware.device == "gpu" or (hardware.device == "auto" and num_gpus >= least)
    if gpu and num_gpus < least:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with a GPU each: the cluster has {num_gpus}; "
            "lower it, or set hardware.device to cpu"
        )
    cpus = hardware.cpus_per_worker
    if not cpus:  # as many as all can have, else as many as the least number of them can have
        each = [c for n in (wanted, least) for c in range(num_cpus // n, 0, -1) if capacity(rooms, c, gpu) >= n]
        cpus = each[0] if each else 1
    if capacity(rooms, cpus, gpu) < least:
        raise ValueError(
            f"hardware.num_workers is {hardware.num_workers}, with {cpus} CPUs{' and a GPU' if gpu else ''} each: "
            f"the cluster has {num_cpus} on {len(rooms)} nodes, room for {capacity(rooms, cpus, gpu)}; "
            "lower it, or hardware.cpus_per_worker; [least, most] takes what there is"
        )
    return gpu, cpus


def preflight(hardware: Hardware, root: Path, storage: AnyPath, published: AnyPath | None, tracking_uri: str) -> None:
    """What would fail later, and not say why: raises ValueError with the setting to change. Nothing has started yet.

    A cluster of several nodes needs storage, data and tracking that each of them reaches, and the same versions on
    all; a job's own folder is thrown away with it. `published` is the corpus where the nodes find it.
    """
    if started_here():
        return
    alive, job = nodes(), JOB in os.environ
    if len(alive) == 1 and not job and hardware.max_workers == hardware.min_workers:
        return
    why = f"the cluster has {len(alive)} nodes" if len(alive) > 1 else "more nodes may join the cluster"
    if job:
        why = f"{why}, and a job's folder is thrown away with it"
    if not run_storage_is_set():
        raise ValueError(
            f"{why}, and {RUN_STORAGE_ENV} is not set: name a folder that all nodes see, or a URI such as "
            "s3://bucket/runs, for checkpoints and data (and run python -m pipeline.publish once)"
        )
    if is_local_store(tracking_uri):
        raise ValueError(
            f"{why}, and MLFLOW_TRACKING_URI is {tracking_uri}, a file: start a server (mlflow server) and name it"
        )
    probe = storage / f".probe-{uuid.uuid4().hex}"
    write_text(probe, "")
    look = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    tasks = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            probe, published, tracking_uri, versions()
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
    """Whether MLflow's store is a file, and so another one on each machine."""
    return tracking_uri.startswith(("sqlite:", "file:")) or ":" not in tracking_uri


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],  # a build for CPUs may drive one for GPUs
        "ray": ray.__version__,
    }


def probe_node(probe: AnyPath, published: AnyPath | None, tracking_uri: str, expected: dict[str, str]) -> str | None:
    """What this node lacks, from the node."""
    if (ours := versions()) != expected:
        return f"has {ours}, the driver {expected}: give all nodes the same image"
    own = probe.with_name(f"{probe.name}-{uuid.uuid4().hex}")
    try:
        with as_os_error(probe):
            probe.read_text(encoding="utf-8")
            own.write_text("", encoding="utf-8")
            own.unlink()
    except (OSError, ImportError) as error:
        return (
            f"cannot read and write {probe.parent} ({error}): set {RUN_STORAGE_ENV} to a folder that all nodes "
            "see, or to a URI such as s3://bucket/runs"
        )
    if published:
        try:
            fetch(published)
        except (OSError, ValueError) as error:
            return f"cannot read the corpus: {error}"
    from pipeline.tracking.store import server_answers, without_password  # here: MLflow is slow to import

    if not server_answers(tracking_uri):
        address = without_password(tracking_uri)
        return f"gets no answer from {address}: set MLFLOW_TRACKING_URI to an address that all nodes reach"
    return None
