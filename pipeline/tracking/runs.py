"""The life cycle of an MLflow run: a process opens, owns and ends it; `reconcile` ends the runs of dead processes.

There is one run per `run_key`, which identifies everything that training depends on: training that is resumed or
repeated uses the same run. The driver opens and ends the run, the training worker logs its curves through a
`MetricWriter`, and evaluation adds its results.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pipeline.common.paths import CLEAN
from pipeline.common.settings import Settings, flatten
from pipeline.common.storage import AnyPath, one_at_a_time
from pipeline.tracking.names import changes_text, run_name
from pipeline.tracking.notes import NOTE, describe_run
from pipeline.tracking.provenance import dvc_hashes, git_tags
from pipeline.tracking.store import await_server, connect, find_run, open_experiment, refusal_as_connection_error

logger = logging.getLogger(__name__)

LONG_SILENCE_S = 90
"""Seconds without a sign of life after which a run counts as dead. Workers write one at least every 20 s
(accounting.py)."""

ENDING_S = 15
"""Seconds to wait for a process that is ending. A stage ends within this time after its `dvc repro` is killed
(cli.begin), and the user may run `dvc repro` again immediately."""


@refusal_as_connection_error
def open_run(
    uri: str,
    settings: Settings,
    run_key: str,
    tags: Mapping[str, str],
    root: Path = Path(),
    folder: AnyPath | None = None,
    last_sign_at: float | None = None,
) -> str:
    """Open the run of `run_key`, or create it, and return its id. The run is then RUNNING and owned by this process.

    The driver calls this before any worker opens the store, because it also creates a new database, which several
    processes cannot do at once. `tags` (workers, device, versions, ...) are added to the tags set here and may
    override MLflow's own: mlflow.runName, mlflow.parentRunId, mlflow.note.content (the description). The tag `change`
    is also logged as a parameter, because MLflow's comparison of runs shows no tags, and only the first three
    parameters in alphabetical order. Tags for programs begin with "run.", so that MLflow's page shows them together.

    A lock in `folder`, the folder of the run, decides between processes that call this at the same moment.
    `last_sign_at` is the time at which the run last updated its usage file (seconds since the epoch).

    Raises ConnectionError if the server does not answer. Raises ValueError if another process on this machine is
    training the run, or if one on another machine gave a sign of life in the last LONG_SILENCE_S seconds.
    """
    await_server(uri, patience_s=10)
    client = connect(uri)
    experiment_id = open_experiment(client, settings.tracking.experiment, root)
    hashes = dvc_hashes(root)
    all_tags = {
        "mlflow.runName": run_name(settings),
        "mlflow.source.name": "python -m pipeline.train",
        "mlflow.source.type": "LOCAL",
        "change": changes_text(settings),
        "run.key": run_key,
        **git_tags(root),
        **{f"run.{name}_md5": md5 for name, md5 in hashes.items()},
        **_owner_tags(),
        **tags,
    }
    params = run_params(settings) | {"change": all_tags["change"]}
    with one_at_a_time(folder) if folder else contextlib.nullcontext():
        run = find_run(client, experiment_id, run_key)
        if run is None:
            run = client.create_run(experiment_id, tags=all_tags)
        else:
            _refuse_if_running_here(run)
            _refuse_if_elsewhere(run, last_sign_at)
        run_id = run.info.run_id
        missing = {key: value for key, value in params.items() if key not in run.data.params}
        # setting the name with log_batch would use four of the server's 15 database connections
        name = all_tags.pop("mlflow.runName")
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in missing.items()],
            tags=[RunTag(key, str(value)) for key, value in all_tags.items()],
        )
        client.update_run(run_id, status="RUNNING", name=name)  # after the owner's tags, which `reconcile` reads
    client.log_dict(run_id, asdict(settings), "settings.yaml")
    if "data" in hashes:
        _log_dataset(client, run_id, settings.data.corpus, hashes["data"], root)
    if NOTE not in tags:
        describe_run(client, run_id)
    return run_id


def _log_dataset(client: MlflowClient, run_id: str, name: str, digest: str, root: Path) -> None:
    source = json.dumps({"uri": str((root / CLEAN).resolve())})
    dataset = Dataset(name, digest, source_type="local", source=source)
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    try:
        client.log_inputs(run_id, inputs)
    except MlflowException:  # another process has logged this data at the same moment
        client.log_inputs(run_id, inputs)


def _refuse_if_running_here(run: Run) -> None:
    """Raise ValueError if another process on this machine owns the run and does not end within ENDING_S seconds."""
    deadline = time.monotonic() + ENDING_S
    while _owner_lives(run) and int(run.data.tags["run.owner_pid"]) != os.getpid():
        if time.monotonic() > deadline:
            raise ValueError(
                f"the same training is already running (process {run.data.tags['run.owner_pid']}, "
                f"MLflow run {run.info.run_id}): wait for it or stop it"
            )
        time.sleep(0.1)


def _refuse_if_elsewhere(run: Run, last_sign_at: float | None) -> None:
    """Raise ValueError if a process on another machine owns the run and has given a sign of life recently.

    Processes on another machine cannot be checked directly. Opening the run counts as a sign of life.
    """
    host = run.data.tags.get("run.owner_host")
    silence_s = time.time() - max(last_sign_at or 0, float(run.data.tags.get("run.owner_since", 0)))
    if run.info.status == "RUNNING" and host != socket.gethostname() and silence_s < LONG_SILENCE_S:
        raise ValueError(
            f"{host} is training this run (MLflow run {run.info.run_id}, last sign of life "
            f"{max(0, silence_s):.0f} s ago): wait for it or stop it; if it has died, start again "
            f"{LONG_SILENCE_S} s after its last sign of life"
        )


def run_params(settings: Settings) -> dict[str, str]:
    """The parameters of an MLflow run: the training settings under short names that fit MLflow's compare view.

    `evaluate` is left out because log_evaluation adds it. `validate` and the sizes of the corpus are only in
    settings.yaml.
    """
    named = {
        "data": settings.data_name,
        "model": settings.model_name,
        "seed": settings.seed,
        "corpus": settings.data.corpus,
        "src": settings.data.src,
        "tgt": settings.data.tgt,
    }
    for section in (settings.tokenize, settings.model, settings.train, settings.hardware):
        named |= flatten(section)
    return {key: str(value) for key, value in named.items()}


def finish_run(uri: str, run_id: str, status: str = "FINISHED", patience_s: float = 600) -> None:
    """End the run. If the server does not answer, only a warning is logged: the trained model is safe on disk."""
    try:
        await_server(uri, patience_s)
        connect(uri).set_terminated(run_id, status)
    except (ConnectionError, MlflowException) as error:
        logger.warning("MLflow run %s could not be marked %s: %s", run_id, status, error)


@contextlib.contextmanager
def run_guard(uri: str, run_id: str) -> Iterator[None]:
    """Mark the run KILLED if its process is stopped within the block, and FAILED after another exception.

    It cannot handle SIGKILL; `reconcile` does.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        finish_run(uri, run_id, "KILLED" if stopped else "FAILED", patience_s=2)
        raise


@refusal_as_connection_error
def reconcile(uri: str, experiment: str) -> list[str]:
    """Mark as KILLED every RUNNING run on this machine whose process is gone. Returns their ids.

    Runs on other machines are not changed, because their processes cannot be checked from here.
    """
    here = socket.gethostname()

    def dead(run: Run) -> bool:
        return run.data.tags.get("run.owner_host") == here and not _owner_lives(run)

    return _kill_running(uri, experiment, dead)


@refusal_as_connection_error
def end_children(uri: str, experiment: str, parent_id: str) -> list[str]:
    """Mark as KILLED every RUNNING child of the run, including those on other machines. Returns their ids.

    Only for the driver of a sweep, which knows that none of them is running any more.
    """
    return _kill_running(uri, experiment, lambda run: run.data.tags.get("mlflow.parentRunId") == parent_id)


def _kill_running(uri: str, experiment: str, nobody_runs: Callable[[Run], bool]) -> list[str]:
    await_server(uri, patience_s=10)
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    running = client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'", max_results=10_000)
    dead = [run.info.run_id for run in running if nobody_runs(run)]
    for run_id in dead:
        client.set_terminated(run_id, "KILLED")
    return dead


def end_run_of(uri: str, run_key: str, experiment: str, status: str, reason: str) -> None:
    """End the run of this key from another process, with the reason as the tag `ended`."""
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    run = find_run(client, found.experiment_id, run_key) if found else None
    if run is not None:
        client.set_tag(run.info.run_id, "ended", reason)
        client.set_terminated(run.info.run_id, status)
        describe_run(client, run.info.run_id)


def _owner_tags() -> dict[str, str]:
    """Tags that identify this process. Its start time is among them because process ids are reused."""
    me = psutil.Process()
    return {
        "run.owner_host": socket.gethostname(),
        "run.owner_pid": str(me.pid),
        "run.owner_started": f"{me.create_time():.0f}",
        "run.owner_since": f"{time.time():.0f}",
    }


def _owner_lives(run: Run) -> bool:
    """Whether the run is RUNNING and its process on this machine is alive."""
    tags = run.data.tags
    if run.info.status != "RUNNING" or tags.get("run.owner_host") != socket.gethostname():
        return False
    try:
        owner = psutil.Process(int(tags["run.owner_pid"]))
        same = abs(owner.create_time() - float(tags["run.owner_started"])) < 2
        return same and owner.status() != psutil.STATUS_ZOMBIE  # in a container, orphans often stay zombies
    except psutil.NoSuchProcess:
        return False
