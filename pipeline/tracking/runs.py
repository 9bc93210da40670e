"""What is told to MLflow. No other module imports it but inference/serving.py, the file that MLflow itself serves.

There is one run per `run_key`, which stands for everything that training depends on: a run that was killed is
continued, and training that is asked for again finds the run it had. The driver opens and ends a run, the
training worker draws its curves through a `MetricWriter`, and evaluation adds its results at the end.
"""

import contextlib
import csv
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import mlflow.pyfunc
import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from pipeline.common.atomic_io import sha256_of
from pipeline.common.paths import CLEAN, TOKENIZER
from pipeline.common.settings import Settings, flatten

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

SEARCH = ("beam", "alpha", "max_extra", "engine")
"""The settings of `evaluate` that change a translation."""
MAX_BATCH = 1000
"""The most metrics that MLflow takes in one call."""
SERVED_WITH = ("mlflow", "numpy", "pyyaml", "safetensors", "sentencepiece", "torch", "tqdm")
"""What inference/serving.py and what it imports need."""
VIEW = "rows"
"""The name of the view that `share_view` gives to an experiment."""
LOCAL_UI = "http://127.0.0.1:5000"
"""Where `make ui` serves."""
LONG_SILENCE_S = 90
"""After so long without a sign a run is taken for dead. Its worker gives one every 20 s at least (usage.py)."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
"""Answers that trying again will not change: a run that was deleted, a metric's name that MLflow forbids."""


def _client(uri: str) -> MlflowClient:
    # MLflow's own seven retries hold a caller for minutes; who can wait does so in _await_server.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it counts local files, three times
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of every table it makes
    try:
        return MlflowClient(uri)
    except Exception as error:  # of a database: MLflow's, SQLAlchemy's or its driver's
        raise ConnectionError(_refusal(uri, error)) from error


def _refusal(uri: str, error: Exception) -> str:
    return f"MLflow's store {without_password(uri)}: {(str(error).strip() or repr(error)).splitlines()[0]}"


def _in_a_line(call: Callable[Concatenate[str, P], R]) -> Callable[Concatenate[str, P], R]:
    """For what a driver asks of the store: a refusal (of a password, say) becomes a ConnectionError of one line."""

    @wraps(call)
    def wrapped(uri: str, /, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            return call(uri, *arguments, **named)
        except MlflowException as error:
            raise ConnectionError(_refusal(uri, error)) from error

    return wrapped


def prepare(uri: str) -> None:
    """If the store is a file, import what it needs and, where it is not there, make its tables: seconds, for which
    nobody has to wait later. Raises ConnectionError if it cannot be opened."""
    if uri.startswith("sqlite:"):
        _client(uri)


def answers(uri: str) -> bool:
    """Whether there is a server at `uri`; a database needs none."""
    if not uri.startswith("http"):
        return True
    try:
        return http_request(get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=5).ok
    except (MlflowException, OSError):
        return False


def _await_server(uri: str, patience_s: float) -> None:
    """Raises ConnectionError when the server has not answered for `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    warned, shown = False, without_password(uri)
    while not answers(uri):
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"the MLflow server {shown} does not answer: start it, or set MLFLOW_TRACKING_URI to another, "
                "or unset it to use the file mlflow.db"
            )
        if not warned:
            logger.warning("The MLflow server %s does not answer; waiting up to %.0f s for it.", shown, patience_s)
            warned = True
        time.sleep(min(2.0, patience_s))


@_in_a_line
def open_run(
    uri: str,
    settings: Settings,
    run_key: str,
    tags: Mapping[str, str],
    root: Path = Path(),
    last_sign_at: float | None = None,
) -> str:
    """The id of the run of `run_key`, RUNNING and owned by this process; made if there is none.

    To be called by the driver before any worker opens the store: it also creates a new database, which several
    processes at once cannot. `tags` (what the caller knows: workers, device, versions, ...) come on top of ours
    and may set MLflow's own, such as mlflow.runName and mlflow.parentRunId. A tag `change` is a parameter too: where
    MLflow compares runs it shows no tags, and of the parameters the first three in the alphabet.

    `last_sign_at` is when the run was last heard of in its folder (seconds since the epoch).

    Raises ConnectionError when the server does not answer, ValueError when another process of this machine is at
    work on the same run, or one elsewhere was LONG_SILENCE_S seconds ago.
    """
    _await_server(uri, patience_s=10)
    client = _client(uri)
    experiment_id = _experiment(client, settings.tracking.experiment, root)
    run = _find(client, experiment_id, run_key)
    if run is not None and _owner_lives(run) and int(run.data.tags["owner_pid"]) != os.getpid():
        raise ValueError(
            f"the same training is running already (process {run.data.tags['owner_pid']}, "
            f"MLflow run {run.info.run_id}): wait for it or stop it"
        )
    if run is not None and last_sign_at is not None:
        _refuse_if_elsewhere(run, last_sign_at)
    hashes = _dvc_hashes(root)
    all_tags = {
        "mlflow.runName": f"{settings.data_name} {settings.model_name}, seed {settings.seed}",
        "run_key": run_key,
        **git_tags(root),
        **{f"{name}_md5": md5 for name, md5 in hashes.items()},
        **_owner_tags(),
        **tags,
    }
    if run is None:
        run = client.create_run(experiment_id, tags=all_tags)
    run_id = run.info.run_id
    params = run_params(settings) | {key: tags[key] for key in ("change",) if key in tags}
    missing = {key: value for key, value in params.items() if key not in run.data.params}
    name = all_tags.pop("mlflow.runName")  # in log_batch it takes four of the 15 connections that a server has
    client.log_batch(
        run_id,
        params=[Param(key, value) for key, value in missing.items()],
        tags=[RunTag(key, str(value)) for key, value in all_tags.items()],
    )
    client.update_run(run_id, status="RUNNING", name=name)  # after its owner is known: `reconcile` may look
    client.log_dict(run_id, asdict(settings), "settings.yaml")
    if "data" in hashes:
        source = json.dumps({"uri": str((root / CLEAN).resolve())})
        dataset = Dataset(settings.download.corpus, hashes["data"], source_type="local", source=source)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        try:
            client.log_inputs(run_id, inputs)
        except MlflowException:  # another process was first to log this data, at the same moment
            client.log_inputs(run_id, inputs)
    return run_id


def _refuse_if_elsewhere(run: Run, last_sign_at: float) -> None:
    """From another machine's sign of life, for its processes cannot be asked."""
    host = run.data.tags.get("owner_host")
    silence_s = time.time() - last_sign_at
    if run.info.status == "RUNNING" and host != socket.gethostname() and silence_s < LONG_SILENCE_S:
        raise ValueError(
            f"{host} is at work on this (MLflow run {run.info.run_id}, heard of {max(0, silence_s):.0f} s ago): wait "
            f"for it or stop it; if it is dead, start again {LONG_SILENCE_S} s after its last sign"
        )


def run_params(settings: Settings) -> dict[str, str]:
    """The settings of training by short names, for MLflow's compare view.

    `evaluate` is left out: log_evaluation adds it. So are the corpus's own limits, which settings.yaml has.
    """
    named = {
        "data": settings.data_name,
        "model": settings.model_name,
        "seed": settings.seed,
        "corpus": settings.download.corpus,
        "src": settings.download.src,
        "tgt": settings.download.tgt,
    }
    for section in (settings.tokenize, settings.model, settings.train, settings.hardware):
        named |= flatten(section)
    return {key: str(value) for key, value in named.items()}


def finish(uri: str, run_id: str, status: str = "FINISHED", patience_s: float = 600) -> None:
    """End the run. A server that stays away is a warning, not an error: what was trained is safe on disk."""
    try:
        _await_server(uri, patience_s)
        _client(uri).set_terminated(run_id, status)
    except (ConnectionError, MlflowException) as error:
        logger.warning("MLflow run %s could not be marked %s: %s", run_id, status, error)


@contextlib.contextmanager
def run_guard(uri: str, run_id: str) -> Iterator[None]:
    """A run that does not come to its end is marked: KILLED after Ctrl-C or SIGTERM, else FAILED.

    SIGTERM raises SystemExit inside, when this is the main thread. Only SIGKILL gets past; see `reconcile`.
    """

    stopped = False

    def stop(signum: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True  # for Ray, if it is at work, makes another exit of this one
        raise SystemExit(128 + signum)

    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except BaseException as error:
        by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM  # its handler, if it was set later
        killed = stopped or by_ray or isinstance(error, KeyboardInterrupt)
        finish(uri, run_id, "KILLED" if killed else "FAILED", patience_s=5)
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, previous)


def without_password(uri: str) -> str:
    """An address as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


@_in_a_line
def reconcile(uri: str, experiment: str) -> list[str]:
    """Mark KILLED every run that is RUNNING on this machine in name alone; returns their ids.

    Runs whose owner is on another machine are left as they are: from here nobody can tell.
    """
    here = socket.gethostname()

    def dead(run: Run) -> bool:
        return run.data.tags.get("owner_host") == here and not _owner_lives(run)

    return _kill_running(uri, experiment, dead)


@_in_a_line
def end_children(uri: str, experiment: str, parent_id: str) -> list[str]:
    """Mark KILLED every child of the run that is RUNNING; returns their ids. For the driver of a sweep alone, which
    knows that none of them is: unlike `reconcile`, this holds for children on other machines too."""
    return _kill_running(uri, experiment, lambda run: run.data.tags.get("mlflow.parentRunId") == parent_id)


def _kill_running(uri: str, experiment: str, nobody_runs: Callable[[Run], bool]) -> list[str]:
    _await_server(uri, patience_s=10)
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    running = client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'", max_results=10_000)
    dead = [run.info.run_id for run in running if nobody_runs(run)]
    for run_id in dead:
        client.set_terminated(run_id, "KILLED")
    return dead


def end_as(uri: str, run_key: str, experiment: str, status: str, reason: str) -> None:
    """End a trial's run in its place, for its process was ended from outside."""
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    run = _find(client, found.experiment_id, run_key) if found else None
    if run is not None:
        client.set_tag(run.info.run_id, "ended", reason)
        client.set_terminated(run.info.run_id, status)


@_in_a_line
def log_report(uri: str, run_id: str, files: Sequence[Path], metrics: Mapping[str, float]) -> None:
    """Add files and figures to a run, in place of those of the same name. Raises ConnectionError when the server
    stays away, ValueError when there is no such run any more."""
    _await_server(uri, patience_s=600)
    client = _client(uri)
    known = _require_run(client, run_id).data.metrics
    for file in files:
        client.log_artifact(run_id, str(file))
    now_ms = time.time_ns() // 1_000_000
    changed = {key: value for key, value in metrics.items() if known.get(key) != value}
    client.log_batch(run_id, metrics=[Metric(key, value, now_ms, 0) for key, value in changed.items()])


def _require_run(client: MlflowClient, run_id: str) -> Run:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"{client.tracking_uri} has no run {run_id} ({error.error_code})") from None
    if run.info.lifecycle_stage != "active":
        raise ValueError(f"run {run_id} was deleted in {client.tracking_uri}: restore it there")
    return run


@_in_a_line
def share_view(uri: str, run_id: str, parameters: Sequence[str], metrics: Sequence[str]) -> str:
    """Give the experiment of `run_id` a view of the children of that run, and return its address.

    It shows them sorted by the first of `metrics`, with these columns, and as parallel coordinates of `parameters`
    against that metric. The view is what the button "Share view" of MLflow's page writes, a tag of the experiment:
    of the page's state, only what differs from its start. Raises as `log_report`.
    """
    _await_server(uri, patience_s=600)
    client = _client(uri)
    experiment_id = _require_run(client, run_id).info.experiment_id
    common: dict[str, Any] = {"isGenerated": False, "deleted": False, "runsCountToCompare": 100}
    lines = {"selectedParams": [*parameters], "selectedMetrics": [metrics[0]], "showAllRuns": True}
    charts = [
        common | {"uuid": f"{VIEW}-lines", "type": "PARALLEL", "metricSectionId": "lines"} | lines,
        *(
            common | {"uuid": f"{VIEW}-{name}", "type": "BAR", "metricSectionId": "bars", "metricKey": name}
            for name in metrics
        ),
    ]
    section = {"display": True, "isReordered": False, "cardHeight": 420}
    state = {
        "runsExpanded": {run_id: True},
        "runsHiddenMode": "SHOWALL",
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in parameters)],
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": False,
        "compareRunCharts": charts,
        "compareRunSections": [
            section | {"uuid": "lines", "name": "What was changed", "columns": 1},
            section | {"uuid": "bars", "name": "What came of it", "columns": 2},
        ],
        "isAccordionReordered": True,  # the sections in this order
    }
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(state))
    server = uri.rstrip("/") if uri.startswith("http") else LOCAL_UI
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}&compareRunsMode=CHART"


def _experiment(client: MlflowClient, name: str, root: Path) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = not client.tracking_uri.startswith("http")  # a server chooses the place for artifacts itself
        folder = (root.resolve() / "mlartifacts").as_uri() if local else None
        try:
            return client.create_experiment(name, artifact_location=folder)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment(client, name, root)  # which another process has made at the same moment
    if experiment.lifecycle_stage != "active":
        raise ValueError(
            f"tracking.experiment is {name!r}, which was deleted in MLflow: restore it there or name another"
        )
    return experiment.experiment_id


def _find(client: MlflowClient, experiment_id: str, run_key: str) -> Run | None:
    runs = client.search_runs([experiment_id], f"tags.run_key = '{run_key}'", max_results=1)
    return runs[0] if runs else None


def _owner_tags() -> dict[str, str]:
    """Which process runs this; a process id alone is used again after a while."""
    me = psutil.Process()
    return {
        "owner_host": socket.gethostname(),
        "owner_pid": str(me.pid),
        "owner_started": f"{me.create_time():.0f}",
    }


def _owner_lives(run: Run) -> bool:
    """Whether a process of this machine is at work on the run."""
    tags = run.data.tags
    if run.info.status != "RUNNING" or tags.get("owner_host") != socket.gethostname():
        return False
    try:
        started = psutil.Process(int(tags["owner_pid"])).create_time()
    except psutil.NoSuchProcess:
        return False
    return abs(started - float(tags["owner_started"])) < 2


def git_tags(root: Path) -> dict[str, str]:
    """The commit (GIT_COMMIT names it where there is no repository), and whether code or settings differ from it."""
    if commit := os.environ.get("GIT_COMMIT"):
        stated = {"git_dirty": os.environ["GIT_DIRTY"]} if "GIT_DIRTY" in os.environ else {}
        return {"git_commit": commit, "mlflow.source.git.commit": commit} | stated
    try:
        commit = _git(root, "rev-parse", "HEAD")
        # dvc.lock and reports change with every run
        changed = _git(root, "status", "--porcelain", "--", "*.py", "*.toml", "dvc.yaml", "params.yaml", "conf")
    except (OSError, subprocess.CalledProcessError):
        return {}
    dirty = "true" if changed else "false"
    return {"git_commit": commit, "mlflow.source.git.commit": commit, "git_dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _dvc_hashes(root: Path) -> dict[str, str]:
    """{"data": DVC's hash of the checked texts, "tokenizer": of the tokenizer}, as far as dvc.lock has them."""
    try:
        stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    except FileNotFoundError:
        return {}
    hashes = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    places = {"data": CLEAN, "tokenizer": TOKENIZER}
    return {name: hashes[str(path)] for name, path in places.items() if str(path) in hashes}


class MetricWriter:
    """Curves from inside training: `log` returns at once and never fails, whatever becomes of the server.

    A thread delivers the points in order, again and again until MLflow has them. A point at or before the last
    step that MLflow has of a metric is dropped: it comes from steps that are taken a second time after a resume.
    A point that was delivered although the answer got lost is recognised by MLflow by its time and value.

    What a process that is killed had still to deliver stands in its last checkpoint, or is computed again from
    there: a worker that resumes logs the checkpoint's curves first. Nothing bounds what waits, as a day's points are
    a few megabytes.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._points: deque[dict[str, Any]] = deque()
        self._last_steps: dict[str, int] | None = None
        self._away = self._refused = False
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Steps must grow from call to call, for each metric by itself."""
        values = {key: float(value) for key, value in metrics.items()}
        point = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": values}
        self._points.append(point)

    def close(self, timeout_s: float = 60) -> bool:
        """Deliver what waits; False if that did not succeed in time."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s + 1)
        if self._points:
            logger.warning("MLflow run %s lacks %d points.", self._run_id, len(self._points))
        return not self._points

    def _run(self) -> None:
        pause_s = 1.0  # so that a fast loop's points share calls
        while not self._refused:
            closing = self._closing.wait(pause_s)
            delivered = self._deliver()
            if closing and (delivered or time.monotonic() > self._deadline):
                return
            pause_s = 1.0 if delivered else min(2 * pause_s, 10.0)
            if closing:
                time.sleep(0.5)

    def _deliver(self) -> bool:
        """Whether all that waited is delivered."""
        try:
            if self._points and not answers(self._uri):
                raise ConnectionError("no answer")
            client = _client(self._uri)
            if self._last_steps is None:
                self._last_steps = _last_steps(client, self._run_id)
            waiting = len(self._points)  # what comes meanwhile shares the next call
            while waiting > 0:
                waiting -= self._deliver_batch(client, self._last_steps)
        except Exception as error:  # a thread has nobody to raise to
            if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                self._refused = True
                logger.warning("MLflow refuses the metrics of run %s: %s", self._run_id, error)
            elif not self._away:
                self._away = True
                logger.warning("MLflow at %s is away (%s); training goes on.", without_password(self._uri), error)
            return False
        if self._away:
            self._away = False
            logger.warning("MLflow at %s is back; it has all points.", without_password(self._uri))
        return True

    def _deliver_batch(self, client: MlflowClient, last_steps: dict[str, int]) -> int:
        """The number of points that are done with."""
        batch: list[Metric] = []
        reached = dict(last_steps)
        num_points = 0
        for point in list(self._points):
            if batch and len(batch) + len(point["metrics"]) > MAX_BATCH:
                break
            num_points += 1
            for key, value in point["metrics"].items():
                if point["step"] > reached.get(key, -1):
                    batch.append(Metric(key, value, point["time_ms"], point["step"]))
                    reached[key] = point["step"]
        if batch:
            client.log_batch(self._run_id, metrics=batch)
        last_steps.update(reached)
        for _ in range(num_points):
            self._points.popleft()
        return num_points


def _last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    # `data.metrics` has values alone, and a metric's history takes a second for 10,000 points.
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


@_in_a_line
def training_run(uri: str, settings: Settings, run_key: str, root: Path = Path()) -> str:
    """The id of the run that trained; a model that was trained elsewhere (`dvc pull`) gets one in this store.

    Raises ConnectionError when the server stays away.
    """
    _await_server(uri, patience_s=600)
    client = _client(uri)
    run = _find(client, _experiment(client, settings.tracking.experiment, root), run_key)
    if run is not None:
        return run.info.run_id
    run_id = open_run(uri, settings, run_key, {"trained": "in another store"}, root)
    finish(uri, run_id)
    return run_id


@_in_a_line
def log_evaluation(
    uri: str,
    settings: Settings,
    run_id: str,
    step: int,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    files: Sequence[Path],
    samples: Sequence[Mapping[str, str]],
) -> str:
    """Add results to the run that trained; returns the id of the run that has them now.

    A run holds one evaluation. With another search (SEARCH) than the one before, the results go into a child
    of it that carries the same parameters; with the same, what is equal is left and what differs is added.

    `metrics` are at `step`, the last of training; `tags` hold BLEU's signatures; `files` go up as they are, and
    `samples` (columns by name) as a table. Raises ConnectionError when the server stays away.
    """
    _await_server(uri, patience_s=600)
    client = _client(uri)
    run = client.get_run(run_id)
    search = {key: str(getattr(settings.evaluate, key)) for key in SEARCH}
    if any(run.data.params.get(key, value) != value for key, value in search.items()):
        run = _evaluation_child(client, run, search, search_name(settings))
        run_id = run.info.run_id
    for file in files:
        client.log_artifact(run_id, str(file), "evaluation")
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(samples[0]) if samples else [])
    writer.writeheader()
    writer.writerows(samples)
    client.log_text(run_id, table.getvalue(), "evaluation/samples.csv")  # MLflow shows CSV as a table

    model_id = run.data.tags.get("model_id")
    now_ms = time.time_ns() // 1_000_000
    changed = {key: float(value) for key, value in metrics.items() if run.data.metrics.get(key) != value}
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now_ms, step, model_id=model_id) for key, value in changed.items()],
        params=[Param(key, value) for key, value in search.items() if key not in run.data.params],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    return run_id


def search_name(settings: Settings) -> str:
    """How translations are searched for: "beam 4, alpha 0.6, max_extra 50, engine torch"."""
    return ", ".join(f"{key} {getattr(settings.evaluate, key)}" for key in SEARCH)


def _evaluation_child(client: MlflowClient, parent: Run, search: Mapping[str, str], name: str) -> Run:
    key = f"{parent.data.tags['run_key']}, {name}"
    child = _find(client, parent.info.experiment_id, key)
    if child and child.info.status == "FINISHED":
        return child
    inherited = {
        tag: value
        for tag, value in parent.data.tags.items()
        if not tag.startswith(("mlflow.", "owner_")) and tag not in ("run_key", "model_id", "weights_sha256")
    }
    own = {
        "mlflow.runName": f"{parent.info.run_name}, {name}",
        "mlflow.parentRunId": parent.info.run_id,
        "run_key": key,
    }
    child = child or client.create_run(parent.info.experiment_id, tags={**inherited, **own})
    params = {**parent.data.params, **search}  # again, if the evaluation that made the child was killed
    client.log_batch(child.info.run_id, params=[Param(key, value) for key, value in params.items()])
    client.set_terminated(child.info.run_id, "FINISHED")
    return client.get_run(child.info.run_id)


@_in_a_line
def log_model(uri: str, run_id: str, model: Path, tokenizer: Path, search: Mapping[str, float]) -> str:
    """Log the trained model for others to load (`mlflow.pyfunc.load_model`) or serve; returns its URI.

    `model` is a folder with weights.safetensors and config.json, `tokenizer` the file spm.model, `search` the
    beam, alpha and max_extra to translate with. The model carries the code it needs and exact versions of the
    packages; nothing in it is pickled. The same weights are logged once only.
    """
    _await_server(uri, patience_s=600)
    client = _client(uri)
    run = client.get_run(run_id)
    weights = model / "weights.safetensors"
    digest = sha256_of(weights)
    if run.data.tags.get("weights_sha256") == digest:
        return f"models:/{run.data.tags['model_id']}"
    code = Path(__file__).parents[1]
    # By way of the client, as mlflow.pyfunc.log_model works on the process's one global store and active run.
    logged = client.create_logged_model(
        run.info.experiment_id, "transformer", source_run_id=run_id, params=run.data.params
    )
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=str(code / "inference" / "serving.py"),
            artifacts={
                "weights": str(weights),
                "config": str(model / "config.json"),
                "tokenizer": str(tokenizer),
            },
            model_config=dict(search),
            code_paths=[str(code), str(code.parent / "model")],
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in SERVED_WITH],
        )
        client.log_model_artifacts(logged.model_id, f"{folder}/model")
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.log_batch(run_id, tags=[RunTag("model_id", logged.model_id), RunTag("weights_sha256", digest)])
    return f"models:/{logged.model_id}"
