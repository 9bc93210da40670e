"""Every environment variable that pipeline/ and sweeps/ read or set, and what it is for.

In common/ rather than cluster/, because tracking/ and the package itself need some of them. It imports the standard
library alone: pipeline/__init__.py reads this before anything else.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# Read: what a user or a tool has set.
RUN_STORAGE_ENV = "RUN_STORAGE"  # where checkpoints and published data are: a shared folder, or a URI of a store
TRACKING_URI_ENV = "MLFLOW_TRACKING_URI"  # MLflow's store; MLflow reads it too
TRACKING_USERNAME_ENV = "MLFLOW_TRACKING_USERNAME"  # of MLflow's server; set too, from an address that has them
TRACKING_PASSWORD_ENV = "MLFLOW_TRACKING_PASSWORD"
CORPUS_MIRROR_ENV = "CORPUS_MIRROR"  # a folder or address that the corpora are taken from instead
RAY_ADDRESS_ENV = "RAY_ADDRESS"  # host:port of a cluster to join; Ray reads it too
DASHBOARD_ENV = "RAY_API_SERVER_ADDRESS"  # the cluster's dashboard, which takes jobs; Ray reads it too
RAY_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in what `ray job submit` runs
RAY_TMPDIR_ENV = "RAY_TMPDIR"  # below it, Ray notes the address of the cluster that `ray start` has started
DVC_STAGE_ENV = "DVC_STAGE"  # DVC sets it in the commands of a stage
DVC_ROOT_ENV = "DVC_ROOT"  # and this, to the project that `dvc repro` or `dvc exp run` was started in
GIT_COMMIT_ENV = "GIT_COMMIT"  # the commit, where there is no repository: in an image or a job
GIT_DIRTY_ENV = "GIT_DIRTY"  # "true" if code or settings differ from that commit
COMPILE_CACHE_ENV = "TORCHINDUCTOR_CACHE_DIR"  # torch.compile's pickles and code; torch reads it
MATMUL_ENV = "MODEL_CPU_MATMUL"  # mkl or onednn; model/cpu/library.py reads it, and measures where it is not set

# Set where the user has set nothing else.
TELEMETRY = {  # no usage reports to the makers of these tools; some of them read this when they are imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "1",  # read by several libraries
}
RAY_LOOPBACK = {  # Ray here listens on 127.0.0.1 alone, as it does on macOS; read when Ray is imported
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
MLFLOW_CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # from 7, which hold a caller for minutes; await_server waits
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # it counts local files, three times
}
RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that watches cloud nodes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # from 2 s: the end of training waits for it
}
RAY_TRAIN_ELASTIC = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # from 60: Ray waits so long for all workers that were there
}
RAY_STARTED_HERE = {
    "RAY_worker_niceness": "0",  # from 15, for the sake of Ray's other processes: here training is all there is
    "RAY_enable_metrics_collection": "0",  # nobody reads them
}

# Set whatever the user has set; None: unset.
NO_DASHBOARD: dict[str, str | None] = {
    # One of Ray's helpers asks the dashboard once a second. Where there is none, it warns each time, and it dies with
    # a traceback when it finds two clusters on this machine: give it an address where nobody answers.
    DASHBOARD_ENV: "http://127.0.0.1:9",
}
RAY_TOKEN_ENV, RAY_TOKEN_PATH_ENV = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"  # what Ray's processes ask for
OWN_DASHBOARD: dict[str, str | None] = {DASHBOARD_ENV: None}  # it may be that of another cluster
TUNE: dict[str, str | None] = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is only evaluated reports nothing
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would go on as if all trials had finished
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # from 2: a trial that ASHA ends delivers its curves first
}
IN_PROCESS: dict[str, str | None] = {"LOCAL_RANK": None}  # torchrun's: Ray Train would join that process group
NETWORK_INTERFACE_ENVS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where torch.distributed listens, in each worker: the interface by which Ray reaches the node."""

FORWARDED = (
    RUN_STORAGE_ENV,
    TRACKING_URI_ENV,
    GIT_COMMIT_ENV,
    GIT_DIRTY_ENV,
    MATMUL_ENV,
    "RAY_USAGE_STATS_ENABLED",
    "MLFLOW_DISABLE_TELEMETRY",
)
"""What processes on other machines get of this one's environment. No secrets: a node has its own access to storage
and tracking."""

_IN_ADDRESS = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/:@]*:(?!\d+/)[^\s@]*@)|(?<=[?&]password=)[^\s&]*")


def without_passwords(text: str) -> str:
    """A text to be shown or kept, without the names and passwords in its addresses."""
    return _IN_ADDRESS.sub("", text)


def set_at_import() -> None:
    """What has to be set before Ray or MLflow is imported."""
    set_defaults(TELEMETRY)
    if is_private():
        set_defaults(RAY_LOOPBACK)


def is_private() -> bool:
    """Whether Ray, where it is needed, is started by this command, for itself."""
    return RAY_JOB_ENV not in os.environ and not os.environ.get(RAY_ADDRESS_ENV)


def set_defaults(defaults: Mapping[str, str]) -> None:
    """Set variables that are not set, for the rest of this process and those that it starts."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def environment(defaults: Mapping[str, str], forced: Mapping[str, str | None]) -> Iterator[None]:
    """Within the block, set `defaults` where they are not set and `forced` in any case; then restore all of them."""
    before = {name: os.environ.get(name) for name in (*defaults, *forced)}
    try:
        set_defaults(defaults)
        _set_all(forced)
        yield
    finally:
        _set_all(before)


def forwarded() -> dict[str, str]:
    """Those of FORWARDED that are set here, without passwords."""
    return {name: without_passwords(os.environ[name]) for name in FORWARDED if name in os.environ}


def _set_all(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
