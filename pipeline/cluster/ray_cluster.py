"""Start Ray on this machine, or join a Ray cluster."""

import logging
import os
import platform
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from pipeline.common.atomic_io import write_text
from pipeline.common.environment import (
    NO_DASHBOARD,
    OWN_DASHBOARD,
    RAY_ADDRESS_ENV,
    RAY_JOB_ENV,
    RAY_STARTED_HERE,
    RAY_TMPDIR_ENV,
    RAY_TOKEN_ENV,
    RAY_TOKEN_PATH_ENV,
    RAY_TRAIN,
    environment,
    forwarded,
    is_private,
)
from pipeline.common.settings import Hardware
from pipeline.common.storage import socket_folder

OBJECT_STORE_BYTES = 200_000_000
"""The object store of Ray on this machine can be small, because nothing large passes through it."""
ANSWER_S = 5.0
TOKEN_ADVICE = (
    "all nodes and every machine that submits jobs need the same token: RAY_AUTH_MODE=token and "
    "RAY_AUTH_TOKEN_PATH=its file (ray get-auth-token --generate makes one)"
)


@contextmanager
def ray_cluster(hardware: Hardware, root: Path, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of this job, or else start Ray on this machine, until the block ends.

    `dashboard`: if Ray is started here, start its dashboard too. It takes memory, but without it Ray does not clean
    up after trials that a scheduler ends. Raises ValueError or ConnectionError with a one-line message if RAY_ADDRESS
    has the wrong form, or if the cluster does not answer or refuses the connection.
    """
    address = os.environ.get(RAY_ADDRESS_ENV)
    with ExitStack() as stack:
        if address:
            options, defaults, forced = _options_to_join(address, root), RAY_TRAIN, {}
            if RAY_JOB_ENV not in os.environ:
                _require_answer(address)
        else:
            folder = stack.enter_context(socket_folder())
            options, defaults = _options_to_start(hardware, dashboard, folder), RAY_TRAIN | RAY_STARTED_HERE
            forced = (OWN_DASHBOARD if dashboard else NO_DASHBOARD) | _own_token(folder)
        stack.enter_context(environment(defaults, forced))
        before = signal.getsignal(signal.SIGTERM)
        _init(address, options)
        stack.callback(ray.shutdown)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler would end the process without a message
        yield


def _init(address: str | None, options: dict[str, Any]) -> None:
    """Call ray.init; again if Ray is started here and fails: on a busy machine it may miss its time limits."""
    for last in (address is not None, True):
        try:
            with _line_if_slow(address):
                ray.init(logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **options)
            return
        except Exception as error:  # Ray has no common type for these errors
            ray.shutdown()
            if last:
                raise ConnectionError(_why_not(error, address)) from error


def _own_token(folder: Path) -> dict[str, str | None]:
    """Create a token that only this user can read, and without which Ray's processes do nothing. Return the variables
    that name it. Ray's own token would be in HOME, where every user can read it."""
    write_text(folder / "token", secrets.token_hex(32))
    return {RAY_TOKEN_PATH_ENV: str(folder / "token"), RAY_TOKEN_ENV: None}


def _require_answer(address: str) -> None:
    """Raise ConnectionError if nobody listens at `address`: `ray.init` would wait for minutes."""
    if address == "auto":  # the last cluster that `ray start` started on this machine
        recorded = Path(os.environ.get(RAY_TMPDIR_ENV) or tempfile.gettempdir()) / "ray/ray_current_cluster"
        address = recorded.read_text(encoding="utf-8").strip() if recorded.is_file() else address
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(
            f"no Ray cluster answers at {address} (RAY_ADDRESS: {reason}); unset it to use this machine alone"
        ) from None


@contextmanager
def _line_if_slow(address: str | None) -> Iterator[None]:
    line = f"waiting for the Ray cluster at {address} (RAY_ADDRESS)"
    timer = threading.Timer(ANSWER_S, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if address:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _options_to_start(hardware: Hardware, dashboard: bool, folder: Path) -> dict[str, Any]:
    quoted = shlex.quote(sys.executable)  # Ray puts it into a command line of Bash
    return {
        "runtime_env": {"py_executable": quoted} if quoted != sys.executable else None,
        "address": "local",  # never a cluster that somebody started on this machine with `ray start`
        "num_cpus": max(len(os.sched_getaffinity(0)), hardware.max_workers),
        "include_dashboard": dashboard,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(folder),
    }


def _options_to_join(address: str, root: Path) -> dict[str, Any]:
    if address.startswith(("ray://", "http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS must be host:port of the head, on a machine of the cluster, got {address!r}; from another "
            "machine, use python -m pipeline.submit or ray job submit"
        )
    if RAY_JOB_ENV in os.environ:  # the job was submitted with its code and environment
        return {}
    return {"runtime_env": {"working_dir": str(root), "env_vars": forwarded()}}


def needs_no_workers(hardware: Hardware) -> bool:
    """Whether training runs in the calling process: with one worker, on this machine."""
    return is_private() and hardware.max_workers == 1


def _why_not(error: Exception, address: str | None) -> str:
    """Turn Ray's error, which has many lines, into one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "ersion mismatch" in text:
        return (
            f"the cluster at {address} has other versions than this machine ({text[:300]}): use Python "
            f"{platform.python_version()} and Ray {ray.__version__} on all nodes"
        )
    if address and any(word in text.lower() for word in ("token", "unauthenticated", "authentication")):
        return f"the cluster at {address} refuses the connection ({text[:300]}): {TOKEN_ADVICE}"
    if address:
        return (  # Ray's error is the same if the token is wrong
            f"no Ray cluster answers at {address} (RAY_ADDRESS), or it refuses the token: {text[:300]}; "
            f"{TOKEN_ADVICE}; unset RAY_ADDRESS to use this machine alone"
        )
    return f"Ray did not start on this machine: {text[:300]}"
