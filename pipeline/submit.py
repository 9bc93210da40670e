"""Run training or a sweep as a job on a Ray cluster.

    python -m pipeline.submit train
    python -m pipeline.submit sweep --env OMP_NUM_THREADS=4

Works from any machine that reaches the cluster's dashboard. It submits a job as
`ray job submit` does, which runs `python -m pipeline.train` or
`python -m sweeps.run` on the cluster's head node. The job gets

- the code and settings of this folder (.rayignore selects the files),
- RUN_STORAGE and MLFLOW_TRACKING_URI, from the environment or the options,
- the Git commit.

The job reads data and writes checkpoints in RUN_STORAGE (run
`python -m pipeline.publish` before), and logs to MLflow. Its log is shown here
until it ends; Ctrl-C stops the log, not the job. A job that died can be
submitted again: it resumes from its last checkpoint.

To get the results here, run `dvc repro` (or `python -m sweeps.run`) with the
same RUN_STORAGE and MLFLOW_TRACKING_URI: it finds the training finished and
does not repeat it.
"""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.cluster.preflight import is_local_store
from pipeline.cluster.ray_cluster import TOKEN_ADVICE
from pipeline.common import cli
from pipeline.common.environment import (
    DASHBOARD_ENV,
    GIT_COMMIT_ENV,
    GIT_DIRTY_ENV,
    RUN_STORAGE_ENV,
    TRACKING_PASSWORD_ENV,
    TRACKING_URI_ENV,
    forwarded,
    without_passwords,
)
from pipeline.common.settings import load_settings
from pipeline.common.storage import is_absolute
from pipeline.tracking.provenance import git_tags

ENTRYPOINTS = {"train": "python -m pipeline.train", "sweep": "python -m sweeps.run"}
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ASK_S = 60.0


def job_environment(
    root: Path, storage: str | None, tracking_uri: str | None, more: dict[str, str]
) -> dict[str, str]:
    """Return the job's environment variables; `more` is added to them or replaces them.

    Raises ValueError if `storage` or `tracking_uri` cannot be shared by several nodes, or contains a password.
    """
    if not storage or not is_absolute(storage):
        raise ValueError(
            f"{RUN_STORAGE_ENV} (or --storage) must be an absolute path that all nodes share, or a URI such as "
            f"s3://bucket/runs, got {storage or 'nothing'}"
        )
    if not tracking_uri or is_local_store(tracking_uri):
        raise ValueError(
            f"{TRACKING_URI_ENV} (or --tracking-uri) must be the address of a server that all nodes reach, got "
            f"{tracking_uri or 'nothing'}"
        )
    for name, uri in ((RUN_STORAGE_ENV, storage), (TRACKING_URI_ENV, tracking_uri)):
        if uri != without_passwords(uri):
            raise ValueError(
                f"{name} contains a password, and the cluster's dashboard shows the environment of a job: remove it, "
                f"and set the password on the nodes ({TRACKING_PASSWORD_ENV}, or the credentials of the storage)"
            )
    found = forwarded() | {RUN_STORAGE_ENV: storage, TRACKING_URI_ENV: tracking_uri}
    tags = git_tags(root)
    if "git_commit" in tags:
        found |= {GIT_COMMIT_ENV: tags["git_commit"], GIT_DIRTY_ENV: tags.get("git_dirty", "true")}
    return found | more


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the cluster's dashboard.

    Raises ConnectionError with a one-line message if the dashboard does not answer, refuses our token or runs another
    version of Ray.
    """
    try:
        client = JobSubmissionClient(address)
        theirs = client._server_ray_version  # the public get_version() returns the version of the jobs API
    except Exception as error:  # Ray passes on the errors of its HTTP library
        text = " ".join(str(error).split()) or type(error).__name__
        if any(sign in text.lower() for sign in ("401", "403", "token", "unauth")):
            raise ConnectionError(
                f"the cluster at {address} refuses the connection ({text[:200]}): {TOKEN_ADVICE}"
            ) from error
        raise ConnectionError(
            f"no Ray dashboard answers at {address} ({text[:200]}): set its address by --address or "
            f"{DASHBOARD_ENV} (http://host:8265; ray dashboard opens a tunnel)"
        ) from error
    for name in ("ray", "ray.dashboard", "ray._private"):  # they log every file that is left out
        logging.getLogger(name).setLevel(logging.ERROR)
    if theirs != ray.__version__:
        raise ConnectionError(
            f"the cluster at {address} runs Ray {theirs}, but this machine has {ray.__version__}: start the cluster "
            "from the image of this commit (infra/Dockerfile), or check out the commit that the cluster runs"
        )
    return client


def submit(client: JobSubmissionClient, what: str, root: Path, environment: dict[str, str]) -> str:
    """Start the job; return its id. Raises ConnectionError if the cluster does not accept it."""
    runtime_env: dict[str, Any] = {"working_dir": str(root), "env_vars": environment}
    try:
        return client.submit_job(entrypoint=ENTRYPOINTS[what], runtime_env=runtime_env)
    except RuntimeError as error:  # Ray raises it for every answer that is an error
        text = " ".join(str(error).split())[-300:]
        raise ConnectionError(f"the cluster at {client.get_address()} did not accept the job: {text}") from error


def follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Print the job's log until the job ends; return its status. Raises the errors of Ray's HTTP library if the
    cluster is gone."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    async def status() -> JobStatus:
        return await asyncio.wait_for(asyncio.to_thread(client.get_job_status, job), ASK_S)

    async def until_its_end() -> JobStatus:
        while True:
            log = asyncio.create_task(tail())
            while not (await asyncio.wait({log}, timeout=ASK_S))[0]:
                await status()  # raises if the head is cut off: the log would neither end nor fail
            await log
            if (found := await status()).is_terminal():
                return found
            await asyncio.sleep(1)

    return asyncio.run(until_its_end())


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def main() -> None:
    parser = cli.parser("pipeline.submit", __doc__)
    parser.add_argument("what", choices=ENTRYPOINTS, help="what to run")
    parser.add_argument(
        "--address",
        metavar="URL",
        help=f"address of the dashboard (default: {DASHBOARD_ENV} if set, else {DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--storage", metavar="URI", help=f"storage of data and checkpoints (default: {RUN_STORAGE_ENV})"
    )
    parser.add_argument(
        "--tracking-uri", metavar="URL", help=f"address of the MLflow server (default: {TRACKING_URI_ENV})"
    )
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        type=_named,
        action="append",
        default=[],
        help="another environment variable of the job, may be repeated; no secrets, because the dashboard shows it",
    )
    parser.add_argument("--no-wait", action="store_true", help="exit once the job is submitted, without its log")
    arguments = parser.parse_args()
    root = Path().resolve()
    address = arguments.address or os.environ.get(DASHBOARD_ENV) or DEFAULT_ADDRESS
    with cli.exit_on_error("submit"):
        load_settings(root)
        variables = job_environment(
            root,
            arguments.storage or os.environ.get(RUN_STORAGE_ENV),
            arguments.tracking_uri or os.environ.get(TRACKING_URI_ENV),
            dict(arguments.env),
        )
        client = connect(address)
        job = submit(client, arguments.what, root, variables)
    print(
        f"submit: {job} runs {ENTRYPOINTS[arguments.what]}\n"
        f"  log:  ray job logs --address {address} --follow {job}\n"
        f"  stop: ray job stop --address {address} {job}\n"
        f"  runs: {without_passwords(variables[TRACKING_URI_ENV])}",
        file=sys.stderr,
        flush=True,
    )
    if arguments.no_wait:
        return
    with cli.exit_on_error("submit", interrupted=f"{job} keeps running"):
        try:
            status = follow(client, job)
        except BrokenPipeError:  # because of `| head`, for example
            raise
        except Exception as error:  # Ray's HTTP library raises several types
            raise ConnectionError(
                f"the cluster at {address} no longer answers ({type(error).__name__}): check whether {job} still "
                "runs; if the head died, restart it and submit again: the job resumes from its last checkpoint"
            ) from None
    print(f"submit: {job} {status.value.lower()}", file=sys.stderr)
    raise SystemExit(0 if status == JobStatus.SUCCEEDED else 1)


if __name__ == "__main__":
    main()
