"""Stores of a cluster: eight processes log a sweep to MLflow with PostgreSQL and S3, and DVC's remote is S3.

.venv/bin/python -m pytest -m host tests/system/test_stores.py    # after apt-get install postgresql
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import mlflow.artifacts
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.common.settings import Settings, load_settings
from pipeline.tracking.metric_writer import MetricWriter
from pipeline.tracking.results import SEARCH_SETTINGS, log_evaluation, log_model
from pipeline.tracking.runs import finish_run, open_run, run_params
from tests.support.stores import POSTGRES_PROGRAMS, S3, Postgres, mlflow_server

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).parents[2]
EXPERIMENT = "transformer"
SPAWN = multiprocessing.get_context("spawn")
TRIALS = range(1, 9)
STEPS = 300
SECONDS_A_STEP = 0.03
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def _no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    with server.started():
        yield server


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if not POSTGRES_PROGRAMS:
        pytest.skip("PostgreSQL's server is missing: apt-get install postgresql")
    server = Postgres()
    with server.started():
        yield server


@dataclass(frozen=True)
class Store:
    uri: str
    s3: S3
    bucket: str
    root: Path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def experiment_id(self) -> str:
        return self.client.get_experiment_by_name(EXPERIMENT).experiment_id

    def runs(self, key: str) -> list[Run]:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        return self.client.search_runs([found.experiment_id], f"tags.`run.key` = '{key}'") if found else []

    def curve(self, run: Run, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, metric)]


@pytest.fixture
def store(postgres: Postgres, s3: S3, tmp_path: Path) -> Iterator[Store]:
    """An MLflow server with a new database and a new bucket, and a project whose corpus has a hash."""
    name = f"store-{time.time_ns()}"
    s3.make_bucket(name)
    hashes = "[{path: data/clean, md5: 0123.dir}, {path: data/tokenizer, md5: 4567.dir}]"
    (tmp_path / "dvc.lock").write_text(f"schema: '2.0'\nstages:\n  validate:\n    cmd: x\n    outs: {hashes}\n")
    with mlflow_server(postgres.make_database(name), f"s3://{name}/mlflow", s3.environment) as uri:
        yield Store(uri, s3, name, tmp_path)


def trial_settings(number: int) -> Settings:
    return load_settings(REPOSITORY).with_seed(number)


def trial_points(number: int) -> Iterator[tuple[int, dict[str, float]]]:
    for step in range(1, STEPS + 1):
        metrics = {"train_loss": number + 1 / step, "learning_rate": step / 7, "tokens_per_s": 1000 * number + step}
        yield step, metrics | ({"valid_loss": number + 2 / step} if step % 10 == 0 else {})


def trial_curve(number: int, metric: str) -> list[tuple[int, float]]:
    return [(step, metrics[metric]) for step, metrics in trial_points(number) if metric in metrics]


def trial_file(number: int, root: Path) -> Path:
    file = root / f"trial {number}" / "translations.tsv"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"the {number} dogs\tdie {number} Hunde\n" * 1000)
    return file


def trial_tags(number: int, parent: str) -> dict[str, str]:
    return {"mlflow.parentRunId": parent, "mlflow.runName": f"row {number}", "change": f"A: {number} heads"}


def log_trial(number: int, uri: str, root: Path, parent: str, start: Barrier) -> None:
    """Log all that a trial of a sweep logs to MLflow. Runs in its own process."""
    settings = trial_settings(number)
    start.wait(PATIENCE_S)
    run_id = open_run(uri, settings, f"trial {number}", trial_tags(number, parent), root)
    writer = MetricWriter(uri, run_id)
    for step, metrics in trial_points(number):
        writer.log(metrics, step)
        time.sleep(SECONDS_A_STEP)
    assert writer.close()
    log_evaluation(
        uri,
        settings,
        run_id,
        {"test_bleu": 10.5 + number},
        {"bleu_signature": "nrefs:1"},
        [trial_file(number, root)],
        [{"source": f"the {number} dogs", "translation": f"die {number} Hunde"}],
    )
    finish_run(uri, run_id)


def open_alone(number: int, uri: str, root: Path, start: Barrier) -> None:
    settings = trial_settings(number)
    start.wait(PATIENCE_S)
    finish_run(uri, open_run(uri, settings, f"driver {number}", {}, root))


def start(target, numbers: Sequence[int], *arguments) -> dict[int, BaseProcess]:
    """Start a process for each of `numbers`. They begin together, once all have finished their imports."""
    barrier = SPAWN.Barrier(len(numbers) + 1)
    processes = {
        number: SPAWN.Process(target=target, args=(number, *arguments, barrier), daemon=True) for number in numbers
    }
    for process in processes.values():
        process.start()
    barrier.wait(PATIENCE_S)
    return processes


def join(processes: dict[int, BaseProcess]) -> None:
    """Wait for all processes, which must succeed."""
    for process in processes.values():
        process.join(PATIENCE_S)
    codes = {number: process.exitcode for number, process in processes.items()}
    assert codes == dict.fromkeys(codes, 0), f"exit codes {codes}: see what the processes printed"


def open_parent(store: Store) -> str:
    return open_run(store.uri, load_settings(REPOSITORY), "sweep", {"row": "all"}, store.root)


def check_sweep(store: Store, parent: str) -> None:
    """Check that MLflow and the bucket have one sweep with eight complete trials, and nothing else."""
    client = store.client
    assert sorted(experiment.name for experiment in client.search_experiments()) == ["Default", EXPERIMENT]
    runs = {run.data.tags["run.key"]: run for run in client.search_runs([store.experiment_id()])}
    assert sorted(runs) == ["sweep", *(f"trial {number}" for number in TRIALS)]
    assert len(client.search_runs([store.experiment_id()])) == 1 + len(TRIALS)
    assert runs["sweep"].info.run_id == parent
    assert "mlflow.parentRunId" not in runs["sweep"].data.tags
    below = f"mlflow/{store.experiment_id()}"
    objects = {f"{below}/{parent}/artifacts/settings.yaml"}
    for number in TRIALS:
        run = runs[f"trial {number}"]
        assert (number, run.info.status) == (number, "FINISHED")
        for metric in ("train_loss", "learning_rate", "tokens_per_s", "valid_loss"):
            assert store.curve(run, metric) == trial_curve(number, metric), f"{metric} of trial {number}"
        assert store.curve(run, "test_bleu") == [(0, 10.5 + number)]
        tags = trial_tags(number, parent) | {"run.data_md5": "0123.dir", "bleu_signature": "nrefs:1"}
        assert tags.items() <= run.data.tags.items()
        settings = trial_settings(number)
        search = {key: str(getattr(settings.evaluate, key)) for key in SEARCH_SETTINGS}
        assert run.data.params == run_params(settings) | search | {"change": f"A: {number} heads"}
        (dataset,) = [entry.dataset for entry in run.inputs.dataset_inputs]
        assert dataset.digest == "0123.dir"
        folder = store.root / f"downloaded {number}"
        folder.mkdir()
        client.download_artifacts(run.info.run_id, "", str(folder))
        logged = (folder / "evaluation/translations.tsv").read_bytes()
        assert logged == trial_file(number, store.root).read_bytes()
        names = ("settings.yaml", "evaluation/samples.csv", "evaluation/translations.tsv")
        objects |= {f"{below}/{run.info.run_id}/artifacts/{name}" for name in names}
        in_bucket = store.s3.sizes(store.bucket, f"{below}/{run.info.run_id}/artifacts/")
        assert in_bucket == {name: (folder / name).stat().st_size for name in names}
    assert set(store.s3.sizes(store.bucket)) == objects


def test_metric_writer_of_eight_processes_logs_each_point_once(store: Store) -> None:
    parent = open_parent(store)
    join(start(log_trial, TRIALS, store.uri, store.root, parent))
    finish_run(store.uri, parent)
    check_sweep(store, parent)


def test_metric_writer_of_a_killed_trial_continues_in_its_run(store: Store) -> None:
    victim = 3
    parent = open_parent(store)
    processes = start(log_trial, TRIALS, store.uri, store.root, parent)
    deadline = time.monotonic() + PATIENCE_S
    while not (runs := store.runs(f"trial {victim}")) or len(store.curve(runs[0], "train_loss")) < STEPS / 4:
        assert time.monotonic() < deadline, f"trial {victim} has no points: see what the processes printed"
        time.sleep(0.05)
    killed = processes.pop(victim)
    killed.kill()
    killed.join()
    assert killed.exitcode == -9
    (run,) = store.runs(f"trial {victim}")
    assert run.info.status == "RUNNING"
    assert STEPS / 4 <= len(store.curve(run, "train_loss")) < STEPS

    # A resumed worker logs all points that it knows again.
    again = start(log_trial, [victim], store.uri, store.root, parent)
    join(processes | again)
    finish_run(store.uri, parent)
    check_sweep(store, parent)
    (continued,) = store.runs(f"trial {victim}")
    assert continued.info.run_id == run.info.run_id
    assert continued.data.tags["run.owner_pid"] == str(again[victim].pid) != str(killed.pid)


def test_open_run_of_eight_drivers_makes_one_experiment_and_dataset(store: Store) -> None:
    join(start(open_alone, TRIALS, store.uri, store.root))
    runs = store.client.search_runs([store.experiment_id()])
    assert sorted(run.data.tags["run.key"] for run in runs) == [f"driver {number}" for number in TRIALS]
    assert [len(run.inputs.dataset_inputs) for run in runs] == [1] * len(TRIALS)
    assert len(store.client.search_experiments()) == 2  # besides "Default"


def test_log_model_stores_its_files_byte_for_byte(store: Store, tmp_path: Path) -> None:
    files = {"weights.safetensors": bytes(range(256)) * 5000, "config.json": b"{}", "spm.model": b"pieces"}
    files["SHA256SUMS"] = b"their checksums"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run_id = open_parent(store)
    search = {"beam": 3, "alpha": 0.6, "max_extra": 5}
    model_uri = log_model(store.uri, run_id, tmp_path, search)
    below = f"mlflow/{store.experiment_id()}/models/{model_uri.removeprefix('models:/')}/artifacts/artifacts/"
    assert store.s3.sizes(store.bucket, below) == {name: len(content) for name, content in files.items()}
    place = store.client.get_logged_model(model_uri.removeprefix("models:/")).artifact_location
    assert place.startswith("mlflow-artifacts:")  # so loading needs no secret
    loaded = mlflow.artifacts.download_artifacts(place, dst_path=str(tmp_path / "loaded"), tracking_uri=store.uri)
    assert {name: (Path(loaded) / "artifacts" / name).read_bytes() for name in files} == files


def test_dvc_pull_from_s3_leaves_nothing_to_run(trained, s3: S3, tmp_path: Path) -> None:
    s3.make_bucket("dvc-remote")
    project = trained.copy(tmp_path / "project", without=("checkpoints",))
    project.run("dvc", "remote", "add", "--default", "store", "s3://dvc-remote/cache")
    project.commit()
    project.run("dvc", "push", **s3.environment)
    clone = type(project)(tmp_path / "clone")
    project.run("git", "clone", "--quiet", str(project.root), str(clone.root))
    assert not (clone.root / "models/final").exists()
    clone.run("dvc", "pull", "--with-deps", "evaluate", **s3.environment)  # without sweep, which has not run

    output = clone.run("dvc", "repro", "evaluate")
    assert "Running" not in output
    assert "Data and pipelines are up to date" in output
    assert clone.run("dvc", "status", "--with-deps", "evaluate").strip() == "Data and pipelines are up to date."
    assert clone.run("git", "status", "--porcelain") == ""
    for file in ("models/final/weights.safetensors", "data/tokenizer/spm.model", "reports/translations.tsv"):
        assert (clone.root / file).read_bytes() == (trained.root / file).read_bytes(), file
