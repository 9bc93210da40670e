"""The Ray cluster that work runs on: started here, or joined."""

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from pipeline.common.environment import (
    NO_DASHBOARD,
    OWN_DASHBOARD,
    RAY_ADDRESS_ENV,
    RAY_JOB_ENV,
    RAY_STARTED_HERE,
    RAY_TRAIN,
    environment,
    forwarded,
)
from pipeline.common.settings import Hardware

OBJECT_STORE_BYTES = 200_000_000
"""Of Ray on this machine: nothing large passes through it."""
TOKEN_ADVICE = (
    "all nodes, and who submits to them, need the same token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=its file "
    "(ray get-auth-token --generate makes one)"
)


@contextmanager
def ray_cluster(hardware: Hardware, root: Path, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of this job, else start Ray on this machine, for as long as the block takes.

    With `dashboard` Ray here has one: it takes memory, but Ray needs it to clean up after trials that a scheduler
    ends. Raises ValueError or ConnectionError, with one line, if there is no such cluster or it refuses us.
    """
    address = os.environ.get(RAY_ADDRESS_ENV)
    if address:
        options, defaults, forced = _options_to_join(address, root), RAY_TRAIN, {}
    else:
        options, defaults = _options_to_start(hardware, dashboard), RAY_TRAIN | RAY_STARTED_HERE
        forced = OWN_DASHBOARD if dashboard else NO_DASHBOARD
    with environment(defaults, forced):
        try:
            ray.init(logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **options)
        except Exception as error:  # Ray has no kind of its own for these
            raise ConnectionError(_why_not(error, address)) from error
        try:
            yield
        finally:
            ray.shutdown()


def _options_to_start(hardware: Hardware, dashboard: bool) -> dict[str, Any]:
    return {
        "address": "local",  # never the cluster that somebody started with `ray start` on this machine
        "num_cpus": max(len(os.sched_getaffinity(0)), hardware.max_workers),
        "include_dashboard": dashboard,
        "object_store_memory": OBJECT_STORE_BYTES,
    }


def _options_to_join(address: str, root: Path) -> dict[str, Any]:
    if address.startswith(("ray://", "http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS is {address!r}: host:port of the head is needed, on a machine of the cluster; "
            "from elsewhere, python -m pipeline.submit or ray job submit"
        )
    if RAY_JOB_ENV in os.environ:  # a job has brought its code and environment along
        return {}
    return {"runtime_env": {"working_dir": str(root), "env_vars": forwarded()}}


def is_private() -> bool:
    """Whether Ray, where it is needed, is started by this command, for itself."""
    return RAY_JOB_ENV not in os.environ and not os.environ.get(RAY_ADDRESS_ENV)


def needs_no_workers(hardware: Hardware) -> bool:
    """Whether training runs in the process that asks for it: one worker, on this machine."""
    return is_private() and hardware.max_workers == 1


def _why_not(error: Exception, address: str | None) -> str:
    """One line of the many that Ray prints."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "ersion mismatch" in text:
        return (
            f"the cluster at {address} has another version ({text[:300]}): all nodes and who submits need "
            f"Python {platform.python_version()} and Ray {ray.__version__}"
        )
    if address and any(word in text.lower() for word in ("token", "unauthenticated", "authentication")):
        return f"the cluster at {address} refuses us ({text[:300]}): {TOKEN_ADVICE}"
    if address:
        return (  # Ray gives no other reason when it is the token
            f"no Ray cluster answers at {address} (RAY_ADDRESS), or not with our token: {text[:300]}; "
            f"{TOKEN_ADVICE}; unset RAY_ADDRESS to use this machine alone"
        )
    return f"Ray did not start here: {text[:300]}"
