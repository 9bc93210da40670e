"""Run training or a sweep on a Ray cluster, from anywhere that reaches its dashboard.

    python -m pipeline.submit train
    python -m pipeline.submit sweep --env OMP_NUM_THREADS=4

It is `ray job submit`, filled in: the job gets this folder's code and settings, which .rayignore lists, RUN_STORAGE
and MLFLOW_TRACKING_URI as they are here or as options name them, and the Git commit. It runs
`python -m pipeline.train` or `python -m sweeps.run` on the cluster's head. Its log is shown here until it ends;
Ctrl-C ends the log, not the job. Submitted again, it goes on from where it was. Afterwards the same command without
submission, with the same RUN_STORAGE and MLFLOW_TRACKING_URI, brings the results here: `dvc repro` finds the
training done.
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
    """The job's environment variables. Raises ValueError for what no cluster of several nodes could use."""
    if not storage or not is_absolute(storage):
        raise ValueError(
            f"{RUN_STORAGE_ENV} is {storage or 'not set'}: an absolute path that all nodes see, or a URI such as "
            "s3://bucket/runs, is needed (or --storage)"
        )
    if not tracking_uri or is_local_store(tracking_uri):
        raise ValueError(
            f"{TRACKING_URI_ENV} is {tracking_uri or 'not set'}: the address of a server that all nodes reach is "
            "needed (or --tracking-uri)"
        )
    for name, uri in ((RUN_STORAGE_ENV, storage), (TRACKING_URI_ENV, tracking_uri)):
        if uri != without_passwords(uri):
            raise ValueError(
                f"{name} has a password in it, and the cluster's dashboard shows a job's environment: leave it out, "
                f"and let the nodes have their own ({TRACKING_PASSWORD_ENV}; what the store's tools read)"
            )
    found = forwarded() | {RUN_STORAGE_ENV: storage, TRACKING_URI_ENV: tracking_uri}
    tags = git_tags(root)
    if "git_commit" in tags:
        found |= {GIT_COMMIT_ENV: tags["git_commit"], GIT_DIRTY_ENV: tags.get("git_dirty", "true")}
    return found | more


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's dashboard. Raises ConnectionError, with one line, if it does not answer, refuses us
    or runs another version."""
    try:
        client = JobSubmissionClient(address)
        theirs = client._server_ray_version  # the public get_version() is that of the jobs API
    except Exception as error:  # Ray passes on the errors of its HTTP library
        text = " ".join(str(error).split()) or type(error).__name__
        if any(sign in text.lower() for sign in ("401", "403", "token", "unauth")):
            raise ConnectionError(f"the cluster at {address} refuses us ({text[:200]}): {TOKEN_ADVICE}") from error
        raise ConnectionError(
            f"no Ray dashboard answers at {address} ({text[:200]}): name the cluster's with --address or "
            f"{DASHBOARD_ENV} (http://host:8265; ray dashboard makes a tunnel)"
        ) from error
    for name in ("ray", "ray.dashboard", "ray._private"):  # they tell of every file that is left out
        logging.getLogger(name).setLevel(logging.ERROR)
    if theirs != ray.__version__:
        raise ConnectionError(
            f"the cluster at {address} runs Ray {theirs}, here is {ray.__version__}: start it from the image of this "
            "version (infra/Dockerfile), or check out the version that it runs"
        )
    return client


def submit(client: JobSubmissionClient, what: str, root: Path, environment: dict[str, str]) -> str:
    """Start the job; returns its name. Raises ConnectionError."""
    runtime_env: dict[str, Any] = {"working_dir": str(root), "env_vars": environment}
    try:
        return client.submit_job(entrypoint=ENTRYPOINTS[what], runtime_env=runtime_env)
    except RuntimeError as error:  # whatever the dashboard answers
        text = " ".join(str(error).split())[-300:]
        raise ConnectionError(f"the cluster at {client.get_address()} did not take the job: {text}") from error


def follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Show the job's log until it ends. Raises whatever Ray's HTTP library does when the cluster is gone."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    async def status() -> JobStatus:
        return await asyncio.wait_for(asyncio.to_thread(client.get_job_status, job), ASK_S)

    async def until_its_end() -> JobStatus:
        while True:
            log = asyncio.create_task(tail())
            while not (await asyncio.wait({log}, timeout=ASK_S))[0]:
                await status()  # a head that is cut off sends no error, and its log has no end
            await log
            if (found := await status()).is_terminal():
                return found
            await asyncio.sleep(1)

    return asyncio.run(until_its_end())


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE is needed")
    return name, value


def main() -> None:
    parser = cli.parser("pipeline.submit", __doc__)
    parser.add_argument("what", choices=ENTRYPOINTS, help="what to run")
    parser.add_argument("--address", help=f"of the dashboard ({DASHBOARD_ENV}, else {DEFAULT_ADDRESS})")
    parser.add_argument("--storage", metavar="URI", help=f"for data and checkpoints ({RUN_STORAGE_ENV})")
    parser.add_argument("--tracking-uri", metavar="URL", help=f"of the MLflow server ({TRACKING_URI_ENV})")
    parser.add_argument(
        "--env",
        metavar="NAME=VALUE",
        type=_named,
        action="append",
        default=[],
        help="more of the job's environment; the dashboard shows it: no secrets",
    )
    parser.add_argument("--no-wait", action="store_true", help="do not show the log")
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
        f"  end:  ray job stop --address {address} {job}\n"
        f"  runs: {without_passwords(variables[TRACKING_URI_ENV])}",
        file=sys.stderr,
        flush=True,
    )
    if arguments.no_wait:
        return
    with cli.exit_on_error("submit", interrupted=f"{job} goes on"):
        try:
            status = follow(client, job)
        except BrokenPipeError:  # of `| head`, say
            raise
        except Exception as error:  # of Ray's HTTP library, of several kinds
            raise ConnectionError(
                f"the cluster at {address} does not answer any more ({type(error).__name__}): see whether {job} "
                "still runs; if the head died, start it and submit it again: it goes on from its last checkpoint"
            ) from None
    print(f"submit: {job} {status.value.lower()}", file=sys.stderr)
    raise SystemExit(0 if status == JobStatus.SUCCEEDED else 1)


if __name__ == "__main__":
    main()
