"""MLflow's store: the client, waiting for a server, and MLflow's errors as one-line errors."""

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from pipeline.common.environment import (
    MLFLOW_CLIENT,
    TRACKING_PASSWORD_ENV,
    TRACKING_USERNAME_ENV,
    set_defaults,
    without_passwords,
)
from pipeline.common.retry import every, retry
from pipeline.common.storage import database_file, home
from pipeline.tracking.database import artifacts_beside, open_database

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


def connect(uri: str) -> MlflowClient:
    """A client of the store with few retries and log lines. Raises ConnectionError if a database cannot be opened."""
    set_defaults(MLFLOW_CLIENT)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it logs every table that it creates
    file = database_file(uri)
    try:
        return open_database(uri, file) if file else MlflowClient(address(uri))
    except Exception as error:  # of MLflow, SQLAlchemy or the database driver
        way_out = "; move that file away to start a new store" if file and file.exists() else ""
        raise ConnectionError(f"{_refusal(uri, error)}{way_out}") from error


def address(uri: str) -> str:
    """The URI of a store, for a server without user name and password.

    They are moved to MLflow's environment variables, because its error messages show the URI.
    """
    parts = urlsplit(uri)
    if not (parts.scheme.startswith("http") and parts.username and parts.password):
        return uri
    os.environ[TRACKING_USERNAME_ENV] = unquote(parts.username)
    os.environ[TRACKING_PASSWORD_ENV] = unquote(parts.password)
    return without_passwords(uri)


def _refusal(uri: str, error: Exception) -> str:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return without_passwords(f"MLflow's store {uri}: {reason}")


def refusal_as_connection_error(call: Callable[Concatenate[str, P], R]) -> Callable[Concatenate[str, P], R]:
    """Decorator: turn an MlflowException (a wrong password, for example) into a one-line ConnectionError."""

    @wraps(call)
    def wrapped(uri: str, /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            return call(uri, *arguments, **named)
        except MlflowException as error:
            raise ConnectionError(_refusal(uri, error)) from error

    return wrapped


def prepare_store(uri: str) -> None:
    """If the store is a file, open it and create missing tables. Raises ConnectionError if it cannot be opened.

    This takes seconds, so it can run while something else starts.
    """
    if database_file(uri):
        connect(uri)


def server_answers(uri: str) -> bool:
    """Whether the server at `uri` answers. True for a database, which needs no server."""
    if not uri.startswith("http"):
        return True
    try:
        return http_request(get_default_host_creds(address(uri)), "/health", "GET", max_retries=0, timeout=5).ok
    except (MlflowException, OSError):
        return False


def await_server(uri: str, patience_s: float) -> None:
    """Wait until the server answers. Raises ConnectionError after `patience_s` seconds."""
    shown, warned = without_passwords(uri), False

    def ask() -> None:
        if not server_answers(uri):
            raise ConnectionError(
                f"the MLflow server {shown} does not answer: start it, or set MLFLOW_TRACKING_URI to another, "
                "or unset it to use the file mlflow.db"
            )

    def log(_: Exception, pause_s: float) -> None:
        nonlocal warned
        if not warned:
            logger.warning("The MLflow server %s does not answer; waiting up to %.0f s for it.", shown, patience_s)
        warned = True

    pauses_s = every(min(2.0, patience_s), patience_s)
    retry(ask, pauses_s, lambda error: isinstance(error, ConnectionError), log)


@refusal_as_connection_error
def count_runs(uri: str, most: int) -> int:
    """The number of runs in the store, counted up to `most`. Raises ConnectionError if the store refuses."""
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return len(client.search_runs(experiments, max_results=most)) if experiments else 0


def open_experiment(client: MlflowClient, name: str, root: Path) -> str:
    """The id of the experiment, which is created if there is none. Raises ValueError if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = not client.tracking_uri.startswith("http")  # a server chooses the location of artifacts itself
        file = database_file(client.tracking_uri)
        folder = artifacts_beside(file) if file else home(root) / "mlartifacts"
        try:
            experiment_id = client.create_experiment(name, artifact_location=folder.as_uri() if local else None)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return open_experiment(client, name, root)  # created by another process at the same moment
        if local:
            _delete_empty_default(client)
        return experiment_id
    if experiment.lifecycle_stage != "active":
        raise ValueError(
            f"tracking.experiment is {name!r}, which was deleted in MLflow: restore it there or name another"
        )
    return experiment.experiment_id


def _delete_empty_default(client: MlflowClient) -> None:
    """Delete the empty experiment "Default" that MLflow creates in a new database. On a server, others may use it."""
    default = client.get_experiment_by_name("Default")
    if default is None or default.lifecycle_stage != "active":
        return
    if not client.search_runs([default.experiment_id], run_view_type=ViewType.ALL, max_results=1):
        client.delete_experiment(default.experiment_id)


def find_run(client: MlflowClient, experiment_id: str, run_key: str) -> Run | None:
    runs = client.search_runs([experiment_id], f"tags.`run.key` = '{run_key}'", max_results=1)
    return runs[0] if runs else None


def require_run(client: MlflowClient, run_id: str) -> Run:
    """The run with this id. Raises ValueError if there is none, or if it was deleted."""
    shown = without_passwords(client.tracking_uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"{shown} has no run {run_id} ({error.error_code})") from None
    if run.info.lifecycle_stage != "active":
        raise ValueError(f"run {run_id} was deleted in {shown}: restore it there")
    return run
