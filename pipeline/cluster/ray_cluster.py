"""The Ray cluster that work runs on: started here, or joined."""

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
"""Of Ray on this machine: nothing large passes through it."""
ANSWER_S = 5.0
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
            signal.signal(signal.SIGTERM, before)  # Ray's ends the process without a word
        yield


def _init(address: str | None, options: dict[str, Any]) -> None:
    """ray.init, here a second time if need be: on a busy machine its processes may not start in Ray's time."""
    for last in (address is not None, True):
        try:
            with _line_if_slow(address):
                ray.init(logging_level=logging.ERROR, logging_config=ray.LoggingConfig(log_level="ERROR"), **options)
            return
        except Exception as error:  # Ray has no kind of its own for these
            ray.shutdown()
            if last:
                raise ConnectionError(_why_not(error, address)) from error


def _own_token(folder: Path) -> dict[str, str | None]:
    """A token that only this user can read, without which Ray's processes do nothing. Ray would make its own below
    HOME, for all to read."""
    write_text(folder / "token", secrets.token_hex(32))
    return {RAY_TOKEN_PATH_ENV: str(folder / "token"), RAY_TOKEN_ENV: None}


def _require_answer(address: str) -> None:
    """Raise ConnectionError if nobody listens at `address`, for which `ray.init` would wait for minutes."""
    if address == "auto":  # the cluster that `ray start` has started last on this machine
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
    quoted = shlex.quote(sys.executable)  # Ray makes a line of Bash of it
    return {
        "runtime_env": {"py_executable": quoted} if quoted != sys.executable else None,
        "address": "local",  # never the cluster that somebody started with `ray start` on this machine
        "num_cpus": max(len(os.sched_getaffinity(0)), hardware.max_workers),
        "include_dashboard": dashboard,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(folder),
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
