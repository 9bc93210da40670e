"""Every environment variable that pipeline/ and sweeps/ read or set, with its purpose.

This module is in common/ rather than cluster/ because tracking/ and the package itself need some of the variables. It
imports only the standard library because pipeline/__init__.py imports it before anything else.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Read. A user or a tool sets them.
RUN_STORAGE_ENV = "RUN_STORAGE"  # for checkpoints and published data: a shared folder, or the URI of a store
TRACKING_URI_ENV = "MLFLOW_TRACKING_URI"  # MLflow's store; also read by MLflow
TRACKING_USERNAME_ENV = "MLFLOW_TRACKING_USERNAME"  # for MLflow's server; also set here, if the URI has a password
TRACKING_PASSWORD_ENV = "MLFLOW_TRACKING_PASSWORD"
CORPUS_MIRROR_ENV = "CORPUS_MIRROR"  # a folder or URL to download the corpora from instead
RAY_ADDRESS_ENV = "RAY_ADDRESS"  # host:port of a cluster to join; also read by Ray
DASHBOARD_ENV = "RAY_API_SERVER_ADDRESS"  # the cluster's dashboard, which accepts jobs; also read by Ray
RAY_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the process of a submitted job
RAY_TMPDIR_ENV = "RAY_TMPDIR"  # below it, `ray start` writes the address of its cluster
DVC_STAGE_ENV = "DVC_STAGE"  # set by DVC in the commands of a stage
DVC_ROOT_ENV = "DVC_ROOT"  # set by DVC too: the project where `dvc repro` or `dvc exp run` was started
GIT_COMMIT_ENV = "GIT_COMMIT"  # the commit, for an image or a job without a repository
GIT_DIRTY_ENV = "GIT_DIRTY"  # "true" if code or settings differ from that commit
COMPILE_CACHE_ENV = "TORCHINDUCTOR_CACHE_DIR"  # for the code and pickles of torch.compile; read by torch
MATMUL_ENV = "MODEL_CPU_MATMUL"  # mkl or onednn; if not set, model/cpu/library.py measures which is faster

# Defaults. A value that the user has set is kept.
TELEMETRY = {  # no usage reports to the makers of these tools; some read this when they are imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",  # read by several libraries
}
RAY_LOOPBACK = {  # Ray on this machine listens only on 127.0.0.1, as on macOS; read when Ray is imported
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
MLFLOW_CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # default 7, which blocks for minutes; await_server waits instead
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # no progress bars: three, even for local files
}
RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an extra process that watches cloud nodes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # default 2 s; the end of training waits for the next check
}
RAY_TRAIN_ELASTIC = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # default 60; how long Ray waits for lost workers to return
}
RAY_STARTED_HERE = {
    "RAY_worker_niceness": "0",  # default 15, to favour Ray's other processes; here nothing competes with training
    "RAY_enable_metrics_collection": "0",  # nobody reads the metrics
}

# Forced, whatever the user has set. None removes the variable.
NO_DASHBOARD: dict[str, str | None] = {
    # One of Ray's helper processes polls the dashboard every second. Without a dashboard it warns each time, and it
    # dies with a traceback if it finds two clusters on this machine. Give it an address where nobody answers.
    DASHBOARD_ENV: "http://127.0.0.1:9",
}
RAY_TOKEN_ENV, RAY_TOKEN_PATH_ENV = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # the token of Ray's processes
OWN_DASHBOARD: dict[str, str | None] = {DASHBOARD_ENV: None}  # the address may be another cluster's
TUNE: dict[str, str | None] = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that only evaluates reports no metrics
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would continue as if all trials had finished
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # default 2; a trial stopped by ASHA first delivers its curves
}
IN_PROCESS: dict[str, str | None] = {"LOCAL_RANK": None}  # set by torchrun; Ray Train would join its process group
NETWORK_INTERFACE_ENVS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Set in each worker to the network interface by which Ray reaches the node: torch.distributed listens there."""

FORWARDED = (
    RUN_STORAGE_ENV,
    TRACKING_URI_ENV,
    GIT_COMMIT_ENV,
    GIT_DIRTY_ENV,
    MATMUL_ENV,
    "RAY_USAGE_STATS_ENABLED",
    "MLFLOW_DISABLE_TELEMETRY",
)
"""The variables that are passed to processes on other machines.

Secrets are not among them: each node has its own credentials for storage and tracking."""

_IN_ADDRESS = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/:@]*:(?!\d+/)[^\s@]*@)|(?<=[?&]password=)[^\s&]*")


def without_passwords(text: str) -> str:
    """The text without user names and passwords in URLs, to be printed or saved."""
    return _IN_ADDRESS.sub("", text)


def set_at_import() -> None:
    """Set the variables that Ray and MLflow read when they are imported."""
    set_defaults(TELEMETRY)
    if is_private():
        set_defaults(RAY_LOOPBACK)


def is_private() -> bool:
    """Whether this command starts a Ray cluster of its own, if it needs one, rather than joining another."""
    return RAY_JOB_ENV not in os.environ and not os.environ.get(RAY_ADDRESS_ENV)


def set_defaults(defaults: Mapping[str, str]) -> None:
    """Set those variables that are not set, for this process and its children."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def environment(defaults: Mapping[str, str], forced: Mapping[str, str | None]) -> Iterator[None]:
    """For the block, set `defaults` that are not set yet, and `forced` in any case. Restores all of them after it."""
    before = {name: os.environ.get(name) for name in (*defaults, *forced)}
    try:
        set_defaults(defaults)
        _set_all(forced)
        yield
    finally:
        _set_all(before)


def forwarded() -> dict[str, str]:
    """The variables of FORWARDED that are set in this process, without passwords."""
    return {name: without_passwords(os.environ[name]) for name in FORWARDED if name in os.environ}


def _set_all(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
