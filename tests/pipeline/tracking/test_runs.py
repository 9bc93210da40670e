"""Runs in a real store: open, continue, refuse, end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.common.settings import Settings, flatten
from pipeline.tracking.runs import (
    ENDING_S,
    LONG_SILENCE_S,
    end_children,
    end_run_of,
    finish_run,
    open_run,
    reconcile,
    run_guard,
    run_params,
)

EXPERIMENT = "transformer"


def dead_pid() -> str:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def test_open_run_logs_name_parameters_tags_settings_and_dataset(
    uri: str, root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc")
    (root / "dvc.lock").write_text(
        "schema: '2.0'\n"
        "stages:\n"
        "  validate:\n    cmd: x\n    outs:\n"
        "    - {path: data/clean, hash: md5, md5: 0123456789abcdef0123456789abcdef.dir}\n"
        "    - {path: reports/validation.json, hash: md5, md5: ffff}\n"
        "  tokenize:\n    cmd: x\n    outs:\n    - {path: data/tokenizer, hash: md5, md5: aaaa.dir}\n"
    )
    run_id = open_run(uri, settings, "key", {"num_workers": "2"}, root)

    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "mini on grammar, seed 1"
    assert run.data.params["num_heads"] == str(settings.model.num_heads)
    assert run.data.params["positions"] == settings.model.positions
    assert run.data.tags["run.data_md5"] == "0123456789abcdef0123456789abcdef.dir"
    assert run.data.tags["run.tokenizer_md5"] == "aaaa.dir"
    assert run.data.tags["git_commit"] == "abc"
    assert run.data.tags["num_workers"] == "2"
    (dataset,) = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("grammar", run.data.tags["run.data_md5"])
    artifact = root / "mlartifacts" / run_id / "artifacts" / "settings.yaml"
    assert "num_heads" in artifact.read_text()


def test_open_run_logs_a_change_as_parameter_too(uri: str, root: Path, settings: Settings) -> None:
    run_id = open_run(uri, settings, "another", {"change": "A: 1 head"}, root)
    data = MlflowClient(uri).get_run(run_id).data
    assert (data.tags["change"], data.params["change"]) == ("A: 1 head", "A: 1 head")
    changed = replace(settings, changes={"model.dropout": 0.15, "train.max_steps": 100})
    data = MlflowClient(uri).get_run(open_run(uri, changed, "yet another", {}, root)).data
    assert (data.tags["change"], data.params["change"]) == ("dropout 0.15, 100 steps",) * 2


def test_run_params_have_distinct_short_names(settings: Settings) -> None:
    sections = (settings.tokenize, settings.model, settings.train, settings.hardware)
    assert len(run_params(settings)) == 5 + sum(len(flatten(section)) for section in sections)


@pytest.mark.parametrize("status", ["RUNNING", "KILLED", "FAILED", "FINISHED"])
def test_open_run_continues_the_run_of_the_same_key(
    uri: str, root: Path, settings: Settings, run_id: str, status: str
) -> None:
    client = MlflowClient(uri)
    client.update_run(run_id, status=status)
    client.set_tag(run_id, "run.owner_pid", dead_pid())
    elsewhere = replace(settings, hardware=replace(settings.hardware, num_workers=7))  # in MLflow, a tag

    assert open_run(uri, elsewhere, "key", {"num_workers": "7"}, root) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["run.owner_pid"] == str(os.getpid())
    assert run.data.tags["num_workers"] == "7"
    assert open_run(uri, settings, "another key", {}, root) != run_id


def test_open_run_refuses_what_another_process_is_running(
    uri: str, root: Path, settings: Settings, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.runs.ENDING_S", 0.5)
    client = MlflowClient(uri)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        client.set_tag(run_id, "run.owner_pid", str(other.pid))
        client.set_tag(run_id, "run.owner_started", f"{time.time():.0f}")
        with pytest.raises(ValueError, match=f"already running .process {other.pid}, MLflow run {run_id}.: wait"):
            open_run(uri, settings, "key", {}, root)
        other.communicate(b"\n")
    assert open_run(uri, settings, "key", {}, root) == run_id


@pytest.mark.parametrize("reaped", [True, False])
def test_open_run_waits_for_a_process_that_is_ending(
    uri: str, root: Path, settings: Settings, run_id: str, reaped: bool
) -> None:
    client = MlflowClient(uri)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2)"]) as other:
        client.set_tag(run_id, "run.owner_pid", str(other.pid))
        client.set_tag(run_id, "run.owner_started", f"{time.time():.0f}")
        if reaped:
            threading.Thread(target=other.wait).start()
        started = time.monotonic()
        assert open_run(uri, settings, "key", {}, root) == run_id
        assert 0.5 < time.monotonic() - started < ENDING_S


def test_open_run_refuses_what_another_machine_has_just_begun(uri: str, settings: Settings, root: Path) -> None:
    open_run(uri, settings, "shared", {"run.owner_host": "worker7"}, root)
    with pytest.raises(ValueError, match=r"^worker7 is training this run .* last sign of life [0-9] s ago"):
        open_run(uri, settings, "shared", {}, root, last_sign_at=None)


def test_open_run_of_two_drivers_at_the_same_moment_gives_the_run_to_one(
    uri: str, root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.tracking.runs.ENDING_S", 0.2)
    fork = multiprocessing.get_context("fork")
    together, queue = fork.Barrier(3), fork.Queue()

    def drive() -> None:
        together.wait()
        try:
            queue.put(open_run(uri, settings, "key", {}, root, root / "checkpoints" / "run"))
        except ValueError as error:
            queue.put(str(error))
        together.wait()

    drivers = [fork.Process(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    together.wait()
    answers = [queue.get(timeout=30), queue.get(timeout=30)]
    together.wait()
    for driver in drivers:
        driver.join()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    answers.remove(run.info.run_id)
    assert answers[0].startswith("the same training is already running")


def test_open_run_refuses_a_deleted_experiment_with_advice(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    client = MlflowClient(uri)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(ValueError, match="'transformer', which was deleted in MLflow: restore it"):
        open_run(uri, settings, "key", {}, root)


def test_open_run_refuses_a_server_that_does_not_answer(
    root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 6)).__next__)
    with pytest.raises(ConnectionError, match=r"server http://127.0.0.1:9 does not answer: start"):
        open_run("http://127.0.0.1:9", settings, "key", {}, root)


def test_open_run_takes_over_from_another_machine_after_its_silence(uri: str, settings: Settings, root: Path) -> None:
    elsewhere = {"run.owner_host": "worker7.example.org", "run.owner_since": "1"}
    run_id = open_run(uri, settings, "shared", elsewhere, root)
    with pytest.raises(ValueError, match=r"^worker7\.example\.org is training this run .* sign of life [5-9] s ago"):
        open_run(uri, settings, "shared", {}, root, last_sign_at=time.time() - 5)
    silent_since = time.time() - LONG_SILENCE_S - 1
    assert open_run(uri, settings, "shared", {}, root, last_sign_at=silent_since) == run_id
    assert open_run(uri, settings, "shared", {}, root, last_sign_at=time.time()) == run_id  # this machine owns it now
    ended = open_run(uri, settings, "ended", elsewhere, root)
    finish_run(uri, ended)
    assert open_run(uri, settings, "ended", {}, root, last_sign_at=time.time()) == ended


def test_reconcile_ends_runs_of_dead_processes_of_this_machine(uri: str, root: Path, settings: Settings) -> None:
    client = MlflowClient(uri)
    names = ("mine", "dead", "pid used again", "elsewhere", "finished")
    runs = {name: open_run(uri, settings, name, {}, root) for name in names}
    client.set_tag(runs["dead"], "run.owner_pid", dead_pid())
    client.set_tag(runs["pid used again"], "run.owner_started", "1")
    client.set_tag(runs["elsewhere"], "run.owner_pid", dead_pid())
    client.set_tag(runs["elsewhere"], "run.owner_host", "elsewhere")
    finish_run(uri, runs["finished"])

    assert set(reconcile(uri, EXPERIMENT)) == {runs["dead"], runs["pid used again"]}
    statuses = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert statuses == {
        "mine": "RUNNING",
        "dead": "KILLED",
        "pid used again": "KILLED",
        "elsewhere": "RUNNING",
        "finished": "FINISHED",
    }
    assert reconcile(uri, "no such experiment") == []


def test_end_children_ends_running_children_of_one_parent_only(
    uri: str, root: Path, settings: Settings, run_id: str
) -> None:
    client = MlflowClient(uri)

    def child(key: str, parent: str) -> str:
        return open_run(uri, settings, key, {"mlflow.parentRunId": parent}, root)

    other_parent = open_run(uri, settings, "other parent", {}, root)
    names = ("running", "elsewhere", "failed", "finished")
    runs = {name: child(name, run_id) for name in names} | {"of the other": child("of the other", other_parent)}
    client.set_tag(runs["elsewhere"], "run.owner_host", "elsewhere")
    finish_run(uri, runs["failed"], "FAILED")
    finish_run(uri, runs["finished"])

    assert set(end_children(uri, EXPERIMENT, run_id)) == {runs["running"], runs["elsewhere"]}
    statuses = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert statuses == {
        "running": "KILLED",
        "elsewhere": "KILLED",
        "failed": "FAILED",
        "finished": "FINISHED",
        "of the other": "RUNNING",
    }
    assert [client.get_run(parent).info.status for parent in (run_id, other_parent)] == ["RUNNING", "RUNNING"]
    assert end_children(uri, EXPERIMENT, run_id) == []
    assert end_children(uri, "no such experiment", run_id) == []


def test_end_run_of_a_key_sets_status_and_reason(uri: str, root: Path, settings: Settings, run_id: str) -> None:
    other = open_run(uri, settings, "another key", {}, root)
    end_run_of(uri, "key", EXPERIMENT, "KILLED", "ended early")
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["ended"]) == ("KILLED", "ended early")
    assert client.get_run(other).info.status == "RUNNING"
    end_run_of(uri, "unknown key", EXPERIMENT, "KILLED", "")  # ended before it had a run
    end_run_of(uri, "another key", "no such experiment", "KILLED", "")
    assert client.get_run(other).info.status == "RUNNING"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ZeroDivisionError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(signal.SIGTERM), "KILLED"),  # raised by Ray in its processes
    ],
)
def test_run_guard_marks_a_run_that_does_not_finish(uri, run_id, error, expected) -> None:
    with pytest.raises(type(error)), run_guard(uri, run_id):
        raise error
    assert MlflowClient(uri).get_run(run_id).info.status == expected


def test_run_guard_leaves_a_good_end_to_finish_run(uri: str, run_id: str) -> None:
    with run_guard(uri, run_id):
        pass
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    finish_run(uri, run_id)
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"
