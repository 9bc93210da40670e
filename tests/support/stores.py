"""A cluster's stores on this machine: an S3 server (moto), PostgreSQL, and an MLflow server that uses both.

All bind 127.0.0.1 and a free port. Of an installed PostgreSQL, only the programs are used, not the data.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import requests

POSTGRES_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Folder of Debian's package `postgresql`, which is not in PATH and has the version in its name."""
SECRETS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
"""Credentials for S3, only for environment variables. moto accepts any."""
PATIENCE_S = 120


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@contextmanager
def _started(
    command: Sequence[str | Path], ready: Callable[[], bool], end: signal.Signals, **options
) -> Iterator[None]:
    """Start a command, yield it once it is `ready`, and end all its processes afterwards."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert process.poll() is None, f"{command[0]} ended with exit code {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} is not ready after {PATIENCE_S} s"
            time.sleep(0.1)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, end)
        process.wait(PATIENCE_S)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


class S3:
    """An S3 server that keeps its objects in memory."""

    def __init__(self) -> None:
        self.port = free_port()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which boto3, and so MLflow and DVC, use this server and no other."""
        return SECRETS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def started(self) -> AbstractContextManager[None]:
        command = [Path(sys.executable).parent / "moto_server", "--host", "127.0.0.1", "--port", str(self.port)]
        url = f"http://127.0.0.1:{self.port}/moto-api/"
        return _started(command, lambda: _answers(url), signal.SIGKILL, stderr=subprocess.DEVNULL)

    @contextmanager
    def client(self) -> Iterator:
        found = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=SECRETS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=SECRETS["AWS_SECRET_ACCESS_KEY"],
            region_name=SECRETS["AWS_DEFAULT_REGION"],
        )
        with closing(found):
            yield found

    def make_bucket(self, name: str) -> None:
        with self.client() as client:
            client.create_bucket(Bucket=name)

    def sizes(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Return {key without prefix: bytes} of all objects below `prefix`."""
        with self.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            found = [entry for page in pages for entry in page.get("Contents", ())]
        return {entry["Key"].removeprefix(prefix): entry["Size"] for entry in found}


class Postgres:
    """A PostgreSQL server with its own data folder. It refuses to run as root, so it runs as nobody."""

    def __init__(self) -> None:
        self.programs = POSTGRES_PROGRAMS[-1]
        self.port = free_port()
        self.options = {"stdout": subprocess.DEVNULL, "cwd": "/"}
        if os.geteuid() == 0:
            self.options |= {"user": "nobody", "group": "nogroup", "extra_groups": ()}

    @contextmanager
    def started(self) -> Iterator[None]:
        folder = Path(tempfile.mkdtemp(prefix="postgres"))
        try:
            if os.geteuid() == 0:
                shutil.chown(folder, "nobody", "nogroup")
            how = ("--username", "nobody", "--auth", "trust", "--encoding", "UTF8", "--no-locale", "--no-sync")
            subprocess.run([self.programs / "initdb", "--pgdata", folder / "data", *how], check=True, **self.options)
            command = [self.programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(self.port)]
            command += ["-c", "unix_socket_directories=", "-c", "log_min_messages=panic"]
            with _started(command, self._is_ready, signal.SIGINT, **self.options):
                yield
        finally:
            shutil.rmtree(folder)

    def _is_ready(self) -> bool:
        return self._run("pg_isready", "--dbname", "postgres").returncode == 0

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        where = ("--host", "127.0.0.1", "--port", str(self.port), "--username", "nobody")
        return subprocess.run([self.programs / program, *where, *arguments], **self.options)

    def make_database(self, name: str) -> str:
        """Make an empty database and return its URI."""
        self._run("createdb", name).check_returncode()
        return f"postgresql+psycopg2://nobody@127.0.0.1:{self.port}/{name}"


@contextmanager
def mlflow_server(
    database: str, artifacts: str, environment: dict[str, str], port: int | None = None
) -> Iterator[str]:
    """Start a server, which makes the tables of a new database, and yield its URI.

    Its pool of 15 connections is MLflow's default.
    """
    port = port or free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", artifacts]
    command += ["--uvicorn-opts", "--log-level warning"]  # log errors, not every request
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }
    with _started(
        command, lambda: _answers(f"{uri}/health"), signal.SIGKILL, env=os.environ | environment | settings
    ):
        yield uri


class HoldingProxy(ThreadingHTTPServer):
    """Forwards requests to `server`. While `holds` is true, it holds back requests with metrics without an answer.

    `release` sends them to the server, after their sender is gone.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server, self.holds = server, True
        self.held: list[Callable[[], object]] = []
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def release(self) -> None:
        for request in self.held:
            request()


class _Handler(BaseHTTPRequestHandler):
    server: HoldingProxy

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        send = partial(requests.request, self.command, self.server.server + self.path, data=body, headers=headers)
        if self.server.holds and self.path.endswith("/log-batch") and json.loads(body).get("metrics"):
            self.server.held.append(send)
            time.sleep(PATIENCE_S)
            return
        answer = send()
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_PATCH = do_PUT = do_POST  # noqa: N815
