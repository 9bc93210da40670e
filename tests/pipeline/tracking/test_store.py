"""The MLflow store: prepare, connect, refuse."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import read_mlflow_creds

from pipeline.tracking.runs import reconcile
from pipeline.tracking.store import connect, count_runs, open_experiment, prepare_store


def test_prepare_store_creates_tables_or_refuses_in_one_line(tmp_path: Path) -> None:
    prepare_store(f"sqlite:///{tmp_path / 'new.db'}")
    with closing(sqlite3.connect(tmp_path / "new.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (0,)
    (tmp_path / "broken.db").write_text("no database" * 1000)
    broken = f"sqlite:///{tmp_path / 'broken.db'}"
    for ask in (prepare_store, lambda uri: reconcile(uri, "transformer")):
        with pytest.raises(
            ConnectionError,
            match=rf"^MLflow's store {broken}: .*file is not a database; move that file away to start a new store$",
        ):
            ask(broken)
    prepare_store("http://127.0.0.1:9")  # no request is sent


def test_connect_gives_mlflow_name_and_password_separately_from_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "another")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = connect("http://us:se%2Fcret@127.0.0.1:9/mlflow")
    assert client.tracking_uri == "http://127.0.0.1:9/mlflow"
    assert read_mlflow_creds() == ("us", "se/cret")
    with pytest.raises(MlflowException) as refused:  # MLflow's message has the address
        client.search_experiments()
    assert "127.0.0.1" in str(refused.value)
    assert "cret" not in str(refused.value)
    assert connect("http://mlflow:5000").tracking_uri == "http://mlflow:5000"
    assert read_mlflow_creds() == ("us", "se/cret")


def test_connect_shows_no_password_of_a_store_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError) as refused:
        connect("postgresql+nodriver://us:secret@127.0.0.1:9/runs")
    assert str(refused.value).startswith("MLflow's store postgresql+nodriver://127.0.0.1:9/runs: ")


def test_open_experiment_deletes_the_default_experiment_of_mlflow_if_it_is_empty(uri: str, root: Path) -> None:
    client = MlflowClient(uri)
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    made = open_experiment(client, "ours", root)
    assert open_experiment(client, "ours", root) == made
    assert [experiment.name for experiment in client.search_experiments()] == ["ours"]
    assert open_experiment(client, "another", root) != made


def test_open_experiment_keeps_a_default_experiment_in_use(uri: str, root: Path) -> None:
    client = MlflowClient(uri)
    run = client.create_run("0")
    client.delete_run(run.info.run_id)  # a deleted run can be restored
    open_experiment(client, "ours", root)
    assert {experiment.name for experiment in client.search_experiments()} == {"Default", "ours"}


def test_count_runs_counts_active_runs_of_all_experiments_up_to_a_number(uri: str) -> None:
    client = MlflowClient(uri)
    runs = [client.create_run(client.create_experiment(name)) for name in ("a", "b", "c")]
    client.delete_run(runs[0].info.run_id)
    assert count_runs(uri, most=10) == 2
    assert count_runs(uri, most=1) == 1
