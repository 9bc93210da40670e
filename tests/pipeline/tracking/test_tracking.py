"""Runs, curves and results in a real store: SQLite files, and a server that is stopped and started again."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings, flatten, load_settings
from pipeline.common.storage import tracking_uri
from pipeline.tracking import runs as tracking
from pipeline.tracking.runs import MetricWriter
from tests.system.stores import free_port, mlflow_server

REPOSITORY = Path(__file__).parents[3]
EXPERIMENT = "transformer"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables; making one takes seconds, copying it does not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with its own store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def uri(root: Path) -> str:
    return tracking_uri(root)


@pytest.fixture(scope="session")
def settings() -> Settings:
    return load_settings(REPOSITORY)


@pytest.fixture
def run_id(uri: str, root: Path, settings: Settings) -> str:
    return tracking.open_run(uri, settings, "key", {}, root)


def curve(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, key)]


def dead_pid() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_a_store_is_prepared_with_its_tables_or_refused_in_a_line(tmp_path: Path) -> None:
    tracking.prepare(f"sqlite:///{tmp_path / 'new.db'}")
    with closing(sqlite3.connect(tmp_path / "new.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (0,)
    (tmp_path / "broken.db").write_text("no database" * 1000)
    broken = f"sqlite:///{tmp_path / 'broken.db'}"
    for ask in (tracking.prepare, lambda uri: tracking.reconcile(uri, EXPERIMENT)):
        with pytest.raises(ConnectionError, match=rf"^MLflow's store {broken}: .*file is not a database$"):
            ask(broken)
    tracking.prepare("http://127.0.0.1:9")  # is not asked


def test_the_store_is_an_absolute_path_because_ray_workers_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(Path()) == f"sqlite:///{Path.cwd()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(Path()) == "http://tracker:5000"


def test_a_new_run_shows_name_parameters_tags_settings_and_dataset(uri: str, root: Path, settings: Settings) -> None:
    (root / "dvc.lock").write_text(
        "schema: '2.0'\n"
        "stages:\n"
        "  validate:\n    outs:\n"
        "    - {path: data/clean, hash: md5, md5: 0123456789abcdef0123456789abcdef.dir}\n"
        "    - {path: reports/validation.json, hash: md5, md5: ffff}\n"
        "  tokenize:\n    outs:\n    - {path: data/tokenizer, hash: md5, md5: aaaa.dir}\n"
    )
    run_id = tracking.open_run(uri, settings, "key", {"num_workers": "2"}, root)

    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "grammar mini, seed 1"
    assert run.data.params["num_heads"] == str(settings.model.num_heads)
    assert run.data.params["positions"] == settings.model.positions
    assert run.data.tags["data_md5"] == "0123456789abcdef0123456789abcdef.dir"
    assert run.data.tags["tokenizer_md5"] == "aaaa.dir"
    assert run.data.tags["num_workers"] == "2"
    (dataset,) = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("grammar", run.data.tags["data_md5"])
    artifact = root / "mlartifacts" / run_id / "artifacts" / "settings.yaml"
    assert "num_heads" in artifact.read_text()


def test_no_parameter_hides_another_of_the_same_short_name(settings: Settings) -> None:
    sections = (settings.tokenize, settings.model, settings.train, settings.hardware)
    assert len(tracking.run_params(settings)) == 6 + sum(len(flatten(section)) for section in sections)


def test_the_commit_and_whether_the_code_differs_from_it_are_tags(
    uri: str, root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.check_output(["git", "-C", str(root), *identity, *arguments], text=True).strip()

    def tags(key: str) -> dict[str, str]:
        return MlflowClient(uri).get_run(tracking.open_run(uri, settings, key, {}, root)).data.tags

    assert "git_commit" not in tags("no repository")
    git("init", "-q")
    (root / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")  # DVC writes it in every run
    clean = tags("clean")
    assert clean["git_commit"] == clean["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert clean["git_dirty"] == "false"
    (root / "code.py").write_text("2\n")
    assert tags("dirty")["git_dirty"] == "true"
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert tags("job")["git_commit"] == "abc"


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED", "FINISHED"])
def test_a_run_is_found_again_by_its_key_and_goes_on(
    uri: str, root: Path, settings: Settings, run_id: str, status: str
) -> None:
    client = MlflowClient(uri)
    client.update_run(run_id, status=status)
    client.set_tag(run_id, "owner_pid", dead_pid())
    elsewhere = replace(settings, hardware=replace(settings.hardware, num_workers=7))  # parameters cannot change

    assert tracking.open_run(uri, elsewhere, "key", {"num_workers": "7"}, root) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["owner_pid"] == str(os.getpid())
    assert run.data.tags["num_workers"] == "7"
    assert tracking.open_run(uri, settings, "another key", {}, root) != run_id


def test_a_run_that_another_process_is_at_work_on_is_refused(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    client = MlflowClient(uri)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        client.set_tag(run_id, "owner_pid", str(other.pid))
        client.set_tag(run_id, "owner_started", f"{time.time():.0f}")
        with pytest.raises(ValueError, match=f"running already .process {other.pid}, MLflow run {run_id}.: wait"):
            tracking.open_run(uri, settings, "key", {}, root)
        other.communicate(b"\n")
    assert tracking.open_run(uri, settings, "key", {}, root) == run_id


def test_a_deleted_experiment_is_an_error_that_says_what_to_do(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    client = MlflowClient(uri)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(ValueError, match="'transformer', which was deleted in MLflow: restore it"):
        tracking.open_run(uri, settings, "key", {}, root)


def test_reconcile_ends_the_runs_of_this_machine_that_nobody_runs(uri: str, root: Path, settings: Settings) -> None:
    client = MlflowClient(uri)
    names = ("mine", "dead", "pid used again", "elsewhere", "finished")
    runs = {name: tracking.open_run(uri, settings, name, {}, root) for name in names}
    client.set_tag(runs["dead"], "owner_pid", dead_pid())
    client.set_tag(runs["pid used again"], "owner_started", "1")
    client.set_tag(runs["elsewhere"], "owner_pid", dead_pid())
    client.set_tag(runs["elsewhere"], "owner_host", "elsewhere")
    tracking.finish(uri, runs["finished"])

    assert set(tracking.reconcile(uri, EXPERIMENT)) == {runs["dead"], runs["pid used again"]}
    statuses = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert statuses == {
        "mine": "RUNNING",
        "dead": "KILLED",
        "pid used again": "KILLED",
        "elsewhere": "RUNNING",
        "finished": "FINISHED",
    }
    assert tracking.reconcile(uri, "no such experiment") == []


def test_end_children_ends_the_running_children_of_one_parent_alone(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    client = MlflowClient(uri)

    def child(key: str, parent: str) -> str:
        return tracking.open_run(uri, settings, key, {"mlflow.parentRunId": parent}, root)

    other_parent = tracking.open_run(uri, settings, "other parent", {}, root)
    names = ("running", "elsewhere", "failed", "finished")
    runs = {name: child(name, run_id) for name in names} | {"of the other": child("of the other", other_parent)}
    client.set_tag(runs["elsewhere"], "owner_host", "elsewhere")
    tracking.finish(uri, runs["failed"], "FAILED")
    tracking.finish(uri, runs["finished"])

    assert set(tracking.end_children(uri, EXPERIMENT, run_id)) == {runs["running"], runs["elsewhere"]}
    statuses = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert statuses == {
        "running": "KILLED",
        "elsewhere": "KILLED",
        "failed": "FAILED",
        "finished": "FINISHED",
        "of the other": "RUNNING",
    }
    assert [client.get_run(parent).info.status for parent in (run_id, other_parent)] == ["RUNNING", "RUNNING"]
    assert tracking.end_children(uri, EXPERIMENT, run_id) == []
    assert tracking.end_children(uri, "no such experiment", run_id) == []


def test_a_trials_run_can_be_ended_by_its_key_with_the_reason(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    other = tracking.open_run(uri, settings, "another key", {}, root)
    tracking.end_as(uri, "key", EXPERIMENT, "KILLED", "ended early")
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["ended"]) == ("KILLED", "ended early")
    assert client.get_run(other).info.status == "RUNNING"
    tracking.end_as(uri, "unknown key", EXPERIMENT, "KILLED", "")  # it had not come to a run
    tracking.end_as(uri, "another key", "no such experiment", "KILLED", "")
    assert client.get_run(other).info.status == "RUNNING"


def terminated_as_by_ray() -> None:
    """While Ray's own code is at work, it makes another exit of ours."""
    with suppress(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    sys.exit(1)


@pytest.mark.parametrize(
    ("ending", "error", "expected"),
    [
        (lambda: 1 / 0, ZeroDivisionError, "FAILED"),
        (lambda: sys.exit("train: the disk is full"), SystemExit, "FAILED"),
        (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, "KILLED"),
        (lambda: signal.raise_signal(signal.SIGTERM), SystemExit, "KILLED"),
        (lambda: sys.exit(signal.SIGTERM), SystemExit, "KILLED"),
        (lambda: terminated_as_by_ray(), SystemExit, "KILLED"),
    ],
)
@pytest.mark.usefixtures("interruptible")
def test_the_guard_marks_a_run_that_does_not_come_to_its_end(uri, run_id, ending, error, expected) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error), tracking.run_guard(uri, run_id):
        ending()
    assert MlflowClient(uri).get_run(run_id).info.status == expected
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_guard_leaves_a_good_end_for_finish_to_say(uri: str, run_id: str) -> None:
    with tracking.run_guard(uri, run_id):
        pass
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    tracking.finish(uri, run_id)
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_a_run_that_another_machine_was_just_heard_of_is_refused_and_taken_over_after_its_silence(
    uri: str, settings: Settings, root: Path
) -> None:
    elsewhere = {"owner_host": "worker7.example.org"}
    run_id = tracking.open_run(uri, settings, "shared", elsewhere, root)
    with pytest.raises(ValueError, match=r"^worker7\.example\.org is at work on this .* heard of 5 s ago"):
        tracking.open_run(uri, settings, "shared", {}, root, last_sign_at=time.time() - 5)
    silent_since = time.time() - tracking.LONG_SILENCE_S - 1
    assert tracking.open_run(uri, settings, "shared", {}, root, last_sign_at=silent_since) == run_id
    assert tracking.open_run(uri, settings, "shared", {}, root, last_sign_at=time.time()) == run_id  # ours by now
    ended = tracking.open_run(uri, settings, "ended", elsewhere, root)
    tracking.finish(uri, ended)
    assert tracking.open_run(uri, settings, "ended", {}, root, last_sign_at=time.time()) == ended


def test_addresses_are_shown_without_passwords() -> None:
    assert tracking.without_password("https://us:secret@mlflow:5000/x") == "https://mlflow:5000/x"
    assert tracking.without_password("http://mlflow:5000/@x") == "http://mlflow:5000/@x"


def test_curves_arrive_whole_and_in_order(uri: str, run_id: str) -> None:
    writer = MetricWriter(uri, run_id)
    for step in range(1, 1501):  # more than MLflow takes at once
        writer.log({"train_loss": 1 / step, "learning_rate": step}, step)
    writer.log({"train_loss": float("nan")}, 1501)
    assert writer.close()
    points = curve(uri, run_id, "train_loss")
    assert points[:-1] == [(step, 1 / step) for step in range(1, 1501)]
    assert curve(uri, run_id, "learning_rate")[-1] == (1500, 1500)
    assert len(points) == 1501


def test_steps_taken_again_after_a_resume_are_not_drawn_twice(uri: str, run_id: str) -> None:
    for first, last in ((1, 55), (51, 90)):  # killed at 55, continued from the checkpoint at 50
        writer = MetricWriter(uri, run_id)
        for step in range(first, last + 1):
            writer.log({"train_loss": step}, step)
            if step % 10 == 0:
                writer.log({"valid_loss": step}, step)
        assert writer.close()
    assert curve(uri, run_id, "train_loss") == [(step, step) for step in range(1, 91)]
    assert curve(uri, run_id, "valid_loss") == [(step, step) for step in range(10, 91, 10)]


def test_a_lost_answer_does_not_double_a_point(
    uri: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_batch, calls = MlflowClient.log_batch, []

    def lose_the_first_answer(*arguments: object, **named: object) -> None:
        log_batch(*arguments, **named)
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionResetError

    monkeypatch.setattr(MlflowClient, "log_batch", lose_the_first_answer)
    writer = MetricWriter(uri, run_id)
    writer.log({"train_loss": 3.0}, 1)
    writer.log({"train_loss": 2.0}, 2)
    assert writer.close()
    assert len(calls) == 2
    assert curve(uri, run_id, "train_loss") == [(1, 3.0), (2, 2.0)]


def test_a_run_deleted_in_mid_training_is_one_warning(
    uri: str, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    MlflowClient(uri).delete_run(run_id)
    writer = MetricWriter(uri, run_id)
    writer.log({"train_loss": 1}, 1)
    assert not writer.close()
    refused, left = (record.message for record in caplog.records)
    assert refused.startswith(f"MLflow refuses the metrics of run {run_id}: ")
    assert left == f"MLflow run {run_id} lacks 1 points."


class Server:
    """`mlflow server` over a store, on one port of this machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.running = ExitStack()

    def start(self) -> None:
        database, artifacts = f"sqlite:///{self.root / 'mlflow.db'}", str(self.root / "served")
        self.running.enter_context(mlflow_server(database, artifacts, {}, self.port))

    def stop(self) -> None:
        self.running.close()


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    server = Server(root)
    server.start()
    yield server
    server.stop()


def test_while_the_server_is_away_training_goes_on_and_afterwards_mlflow_has_every_point_once(
    server: Server, root: Path, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = tracking.open_run(server.uri, settings, "key", {}, root)
    writer = MetricWriter(server.uri, run_id)
    seconds: list[float] = []

    def ours() -> list[str]:
        return [record.message for record in caplog.records if record.name == "pipeline.tracking.runs"]

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            began = time.perf_counter()
            writer.log({"train_loss": step, "tokens_per_s": 2 * step}, step)
            seconds.append(time.perf_counter() - began)
            time.sleep(0.01)

    train(1, 150)
    server.stop()
    train(151, 450)
    while not ours():
        time.sleep(0.1)
    server.start()
    train(451, 500)
    assert writer.close(timeout_s=30)

    assert curve(server.uri, run_id, "train_loss") == [(step, step) for step in range(1, 501)]
    assert curve(server.uri, run_id, "tokens_per_s") == [(step, 2 * step) for step in range(1, 501)]
    assert sorted(seconds)[int(0.99 * len(seconds))] < 0.01
    assert max(seconds) < 1  # a busy machine may hold any call up; a server that is away, none
    away, back = ours()
    assert "is away" in away
    assert "is back" in back

    tracking.finish(server.uri, run_id)
    assert MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"


def test_a_server_that_does_not_answer_is_an_error_before_anything_starts(
    root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 6)).__next__)
    with pytest.raises(ConnectionError, match=r"server http://127.0.0.1:9 does not answer: start"):
        tracking.open_run("http://127.0.0.1:9", settings, "key", {}, root)


def evaluate(uri: str, root: Path, settings: Settings, bleu: float, key: str = "key") -> str:
    translations = root / "translations.tsv"
    translations.write_text("Ein Mann\tA man\n")
    return tracking.log_evaluation(
        uri,
        settings,
        tracking.training_run(uri, settings, key, root),
        step=600,
        metrics={"test_bleu": bleu},
        tags={"bleu_signature": "nrefs:1"},
        files=[translations],
        samples=[{"source": "a man", "translation": "ein Mann"}],
    )


def test_results_join_the_run_that_trained(uri: str, root: Path, settings: Settings, run_id: str) -> None:
    tracking.finish(uri, run_id)
    assert evaluate(uri, root, settings, 41.0) == run_id
    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"test_bleu": 41.0}
    assert run.data.params["beam"] == str(settings.evaluate.beam)
    assert run.data.tags["bleu_signature"] == "nrefs:1"
    artifacts = root / "mlartifacts" / run_id / "artifacts" / "evaluation"
    assert (artifacts / "samples.csv").read_text().splitlines() == ["source,translation", "a man,ein Mann"]
    assert (artifacts / "translations.tsv").exists()


def test_evaluating_once_more_adds_only_what_differs(uri: str, root: Path, settings: Settings, run_id: str) -> None:
    for bleu in (41.0, 41.0, 40.5):
        assert evaluate(uri, root, settings, bleu) == run_id
    assert curve(uri, run_id, "test_bleu") == [(600, 41.0), (600, 40.5)]


def test_a_report_adds_files_and_figures_and_once_more_only_what_differs(uri: str, root: Path, run_id: str) -> None:
    report, table = root / "report.md", root / "table.csv"
    table.write_text("row,bleu\n")
    for text, seconds in (("first", 7.0), ("first", 7.0), ("second", 11.0)):
        report.write_text(text)
        tracking.log_report(uri, run_id, [report, table], {"rows": 13, "seconds": seconds})
    artifacts = root / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "report.md").read_text() == "second"
    assert (artifacts / "table.csv").read_text() == "row,bleu\n"
    assert curve(uri, run_id, "rows") == [(0, 13)]
    assert sorted(curve(uri, run_id, "seconds")) == [(0, 7.0), (0, 11.0)]
    assert MlflowClient(uri).get_run(run_id).data.metrics == {"rows": 13, "seconds": 11.0}


def test_a_report_for_a_run_that_is_gone_names_it(uri: str, run_id: str) -> None:
    with pytest.raises(ValueError, match=r"^sqlite:.* has no run nobody \(RESOURCE_DOES_NOT_EXIST\)$"):
        tracking.log_report(uri, "nobody", [], {})
    MlflowClient(uri).delete_run(run_id)
    with pytest.raises(ValueError, match=f"^run {run_id} was deleted in sqlite:.*: restore it there$"):
        tracking.log_report(uri, run_id, [], {})


def test_a_shared_view_unfolds_the_run_and_sets_parameters_against_the_first_metric(uri: str, run_id: str) -> None:
    address = tracking.share_view(uri, run_id, ["d_k", "dropout"], ["test_bleu", "valid_ppl"])
    experiment = MlflowClient(uri).get_experiment_by_name("transformer")
    where = f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs"
    key = address.removeprefix(f"{where}?viewStateShareKey=").removesuffix("&compareRunsMode=CHART")
    state = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    assert state["runsExpanded"] == {run_id: True}
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`test_bleu`", False)
    columns = ["metrics.`test_bleu`", "metrics.`valid_ppl`", "params.`d_k`", "params.`dropout`"]
    assert state["selectedColumns"] == columns
    lines, *bars = state["compareRunCharts"]
    assert (lines["selectedParams"], lines["selectedMetrics"]) == (["d_k", "dropout"], ["test_bleu"])
    assert [bar["metricKey"] for bar in bars] == ["test_bleu", "valid_ppl"]
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == sections


def test_a_change_is_a_parameter_too(uri: str, root: Path, settings: Settings) -> None:
    run_id = tracking.open_run(uri, settings, "another", {"change": "A: 1 head"}, root)
    data = MlflowClient(uri).get_run(run_id).data
    assert (data.tags["change"], data.params["change"]) == ("A: 1 head", "A: 1 head")


def test_another_search_has_a_child_run_with_the_parameters_of_training(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    wide = replace(settings, evaluate=replace(settings.evaluate, beam=13))
    evaluate(uri, root, settings, 41.0)
    child_id = evaluate(uri, root, wide, 41.5)
    assert evaluate(uri, root, wide, 41.5) == child_id != run_id
    client = MlflowClient(uri)
    parent, child = client.get_run(run_id), client.get_run(child_id)
    assert parent.data.metrics == {"test_bleu": 41.0}
    assert child.data.metrics == {"test_bleu": 41.5}
    assert child.data.tags["mlflow.parentRunId"] == run_id
    assert child.info.run_name == "grammar mini, seed 1, beam 13, alpha 0.6, max_extra 50, engine torch"
    assert child.info.status == "FINISHED"
    assert child.data.params == {**parent.data.params, "beam": "13"}


def test_an_evaluation_that_was_killed_leaves_a_child_run_that_the_next_one_completes(
    uri: str, root: Path, settings: Settings, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(settings, evaluate=replace(settings.evaluate, beam=13))
    evaluate(uri, root, settings, 41.0)

    def killed(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(uri, root, wide, 41.5)
    client = MlflowClient(uri)
    parent, child = client.get_run(run_id), client.get_run(evaluate(uri, root, wide, 41.5))
    assert len(client.search_runs([child.info.experiment_id])) == 2
    assert (child.info.status, child.data.metrics) == ("FINISHED", {"test_bleu": 41.5})
    assert child.data.params == {**parent.data.params, "beam": "13"}


def test_a_model_trained_in_another_store_gets_a_run_here(uri: str, root: Path, settings: Settings) -> None:
    run = MlflowClient(uri).get_run(evaluate(uri, root, settings, 39.0, key="pulled"))
    assert run.data.params["num_heads"] == str(settings.model.num_heads)
    assert (run.data.metrics, run.info.status) == ({"test_bleu": 39.0}, "FINISHED")
