"""The results that evaluation and reports add to a run: scores, tables, files, and the model for others to load."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Param, Run, RunTag

from pipeline.common.atomic_io import SUMS, csv_text, sha256_of
from pipeline.common.settings import Settings
from pipeline.tracking.notes import NOTE, VS_BASE, describe_run, shortened
from pipeline.tracking.runs import finish_run, open_run
from pipeline.tracking.store import (
    await_server,
    connect,
    find_run,
    open_experiment,
    refusal_as_connection_error,
    require_run,
)

SEARCH_SETTINGS = ("beam", "alpha", "max_extra", "engine")
"""The settings of `evaluate` that change translations."""
SERVED_WITH = (
    "filelock", "mlflow", "numpy", "pydantic", "ruamel.yaml", "safetensors", "sentencepiece", "torch", "tqdm",
)  # fmt: skip
"""The packages that inference/serving.py and its imports need."""


@refusal_as_connection_error
def find_training_run(uri: str, settings: Settings, run_key: str, root: Path = Path()) -> str:
    """The id of the run that trained the model. A model from elsewhere (`dvc pull`) gets a new run in this store.

    Raises ConnectionError if the server does not answer within 600 seconds.
    """
    await_server(uri, patience_s=600)
    client = connect(uri)
    run = find_run(client, open_experiment(client, settings.tracking.experiment, root), run_key)
    if run is not None:
        return run.info.run_id
    run_id = open_run(uri, settings, run_key, {"trained": "in another store"}, root)
    finish_run(uri, run_id)
    return run_id


@refusal_as_connection_error
def log_evaluation(
    uri: str,
    settings: Settings,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    files: Sequence[Path],
    samples: Sequence[Mapping[str, str]],
) -> str:
    """Add the results of an evaluation to the run that trained. Returns the id of the run that has them.

    A run has one evaluation. If it was evaluated with another search (SEARCH_SETTINGS) before, the results go into a
    child run with the same parameters. A second evaluation with the same search only logs metrics that have changed.

    `tags` contain the signature of BLEU. `files` are uploaded unchanged, `samples` (rows by column name) as a table.
    Metrics are logged at step 0, because MLflow then draws a bar; at any other step it would draw a curve of one
    point. Raises ConnectionError if the server does not answer within 600 seconds.
    """
    await_server(uri, patience_s=600)
    client = connect(uri)
    run = client.get_run(run_id)
    search = {key: str(getattr(settings.evaluate, key)) for key in SEARCH_SETTINGS}
    if any(run.data.params.get(key, value) != value for key, value in search.items()):
        run = _evaluation_child(client, run, search, settings)
        run_id = run.info.run_id
    for file in files:
        client.log_artifact(run_id, str(file), "evaluation")
    client.log_text(run_id, csv_text(samples), "evaluation/samples.csv")  # MLflow shows CSV as a table

    model_id = run.data.tags.get("run.model_id")
    now_ms = time.time_ns() // 1_000_000
    changed = {key: float(value) for key, value in metrics.items() if run.data.metrics.get(key) != value}
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now_ms, 0, model_id=model_id) for key, value in changed.items()],
        params=[Param(key, value) for key, value in search.items() if key not in run.data.params],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    describe_run(client, run_id)
    return run_id


def search_name(settings: Settings) -> str:
    """The search settings in words: "beam 4, alpha 0.6, max_extra 50, engine torch"."""
    return ", ".join(f"{key} {getattr(settings.evaluate, key)}" for key in SEARCH_SETTINGS)


def _evaluation_child(client: MlflowClient, parent: Run, search: Mapping[str, str], settings: Settings) -> Run:
    name = search_name(settings)
    key = f"{parent.data.tags['run.key']}, {name}"
    child = find_run(client, parent.info.experiment_id, key)
    if child and child.info.status == "FINISHED":
        return child
    inherited = {tag: value for tag, value in parent.data.tags.items() if not tag.startswith(("mlflow.", "run."))}
    own = {
        "mlflow.runName": f"{parent.info.run_name}, {name}",
        "mlflow.parentRunId": parent.info.run_id,
        "mlflow.source.name": "python -m pipeline.evaluate",
        "run.key": key,
    }
    child = child or client.create_run(parent.info.experiment_id, tags={**inherited, **own})
    params = {**parent.data.params, **search}  # logged again if a killed evaluation left the child incomplete
    client.log_batch(child.info.run_id, params=[Param(key, value) for key, value in params.items()])
    client.log_dict(child.info.run_id, asdict(settings), "settings.yaml")
    client.set_terminated(child.info.run_id, "FINISHED")
    return client.get_run(child.info.run_id)


@refusal_as_connection_error
def log_model(uri: str, run_id: str, model: Path, search: Mapping[str, float]) -> str:
    """Log the trained model for others to load (`mlflow.pyfunc.load_model`) or serve. Returns its URI.

    `model` is the folder that the train stage wrote, and `search` has beam, alpha and max_extra for translation. The
    logged model includes the code that it needs and the exact versions of packages; nothing in it is pickled. The
    same weights are logged only once. A model that a killed evaluation left incomplete is completed.
    """
    await_server(uri, patience_s=600)
    client = connect(uri)
    run = client.get_run(run_id)
    digest = sha256_of(model / "weights.safetensors")
    if run.data.tags.get("run.weights_sha256") == digest:
        return f"models:/{run.data.tags['run.model_id']}"
    # Not mlflow.pyfunc.log_model: it uses the global store and active run of the process.
    logged = _begun_model(client, run, digest) or client.create_logged_model(
        run.info.experiment_id,
        "transformer",
        source_run_id=run_id,
        params=run.data.params,
        tags={"run.weights_sha256": digest},
    )
    if logged.status != LoggedModelStatus.READY:
        _upload_model(client, logged.model_id, model, search)
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.log_batch(run_id, tags=[RunTag("run.model_id", logged.model_id), RunTag("run.weights_sha256", digest)])
    return f"models:/{logged.model_id}"


def _begun_model(client: MlflowClient, run: Run, digest: str) -> LoggedModel | None:
    """The incomplete model of these weights that a killed evaluation of the run has left, or None.

    Incomplete models of other weights are marked FAILED, since nobody will complete them.
    """
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    for logged in found:
        if logged.tags.get("run.weights_sha256") == digest and logged.status != LoggedModelStatus.FAILED:
            return logged
        if logged.status == LoggedModelStatus.PENDING:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
    return None


def _upload_model(client: MlflowClient, model_id: str, model: Path, search: Mapping[str, float]) -> None:
    code = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            f"{folder}/model",
            python_model=str(code / "inference" / "serving.py"),
            artifacts={
                "weights": str(model / "weights.safetensors"),
                "config": str(model / "config.json"),
                "tokenizer": str(model / "spm.model"),
                "checksums": str(model / SUMS),
            },
            model_config=dict(search),
            code_paths=[str(code), str(code.parent / "model")],
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in SERVED_WITH],
        )
        client.log_model_artifacts(model_id, f"{folder}/model")
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)


@refusal_as_connection_error
def log_report(
    uri: str, run_id: str, files: Sequence[Path], metrics: Mapping[str, float], note: str | None = None
) -> None:
    """Add files and metrics to a run, replacing those of the same name. `note` becomes its description.

    Raises ConnectionError if the server does not answer within 600 seconds, and ValueError if the run was deleted.
    """
    await_server(uri, patience_s=600)
    client = connect(uri)
    known = require_run(client, run_id).data.metrics
    for file in files:
        client.log_artifact(run_id, str(file))
    now_ms = time.time_ns() // 1_000_000
    changed = {key: value for key, value in metrics.items() if known.get(key) != value}
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now_ms, 0) for key, value in changed.items()],
        tags=[RunTag(NOTE, shortened(note))] if note else [],
    )


@refusal_as_connection_error
def log_comparison(uri: str, run_id: str, metrics: Mapping[str, float], verdict: str) -> None:
    """Add the comparison with base to the run of a trial: `metrics` with the prefix VS_BASE, and `verdict` as a tag.

    Does nothing if the run was deleted.
    """
    client = connect(uri)
    try:
        known = require_run(client, run_id).data
    except ValueError:
        return
    now_ms = time.time_ns() // 1_000_000
    named = {f"{VS_BASE}{key}": value for key, value in metrics.items()}
    if all(known.metrics.get(key) == value for key, value in named.items()) and known.tags.get("verdict") == verdict:
        return
    new = [Metric(key, value, now_ms, 0) for key, value in named.items() if known.metrics.get(key) != value]
    client.log_batch(run_id, metrics=new, tags=[RunTag("verdict", verdict)])
    describe_run(client, run_id)
